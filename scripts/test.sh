#!/usr/bin/env bash
# Everything that has to hold before a change goes in, from a bare checkout: environment, style, types, import
# rules, tests. Usage: scripts/test.sh [--fast] [pytest arguments]
#   --fast   leaves out the tests marked "full" (real processes, seconds to minutes)
#   PYTHON   the interpreter to build .venv with (default: the first python3 from 3.11 up on PATH)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# The reference torch of the tests. It goes in first, and as a constraint, so that nothing else picks another one.
TORCH=torch==2.13.0
VENV=.venv
STAMP=$VENV/.installed-for

pytest_args=()
for argument in "$@"; do
    case $argument in
        --fast) pytest_args+=(-m "not full") ;;
        *) pytest_args+=("$argument") ;;
    esac
done

summary=()
failed=()

# stage NAME COMMAND...: runs the command, remembers its verdict and seconds.
stage() {
    local name=$1 begin=$SECONDS verdict=ok
    shift
    printf '\n--- %s\n' "$name"
    "$@" || { verdict=FAILED; failed+=("$name"); }
    summary+=("$(printf '%-14s %-6s %5d s' "$name" "$verdict" $((SECONDS - begin)))")
    [ "$verdict" = ok ]
}

report() {
    printf '\n'
    printf '%s\n' "${summary[@]}"
    [ -s "${pytest_log:-}" ] && grep -v '^[[:space:]]*$' "$pytest_log" | tail -n 1
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'failed: %s\n' "${failed[*]}"
        exit 1
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found (tried: ${PYTHON:-python3 and python3.11 to python3.14})." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3 scripts/test.sh" >&2
    return 1
}

# Debian keeps venv's half (ensurepip) in a package of its own.
need_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    local package
    package=python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq "$package"
    else
        echo "$1 lacks the venv module. Install it (Debian, Ubuntu: apt-get install $package)." >&2
        return 1
    fi
}

# A venv whose interpreter is gone (moved checkout, upgraded Python) is made anew.
install() {
    local python wanted
    wanted=$(sha256sum pyproject.toml scripts/test.sh | sha256sum)
    if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c 'import miles_agents' 2>/dev/null; then
        echo "$VENV is up to date"
        return
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) && need_venv_module "$python" && "$python" -m venv --clear "$VENV" || return
    fi
    printf '%s\n' "$TORCH" >"$VENV/constraints.txt"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$VENV/bin/python" -m pip show -q torch 2>/dev/null || "$VENV/bin/python" -m pip install -q "$TORCH" || return
    "$VENV/bin/python" -m pip install -q -c "$VENV/constraints.txt" -e '.[dev]' || return
    printf '%s\n' "$wanted" >"$STAMP"
}

run_pytest() {
    "$VENV/bin/python" -m pytest "${pytest_args[@]}" 2>&1 | tee "$pytest_log"
    return "${PIPESTATUS[0]}"
}

stage install install || report
pytest_log=$(mktemp)
trap 'rm -f "$pytest_log"' EXIT
stage ruff "$VENV/bin/ruff" check .
stage format "$VENV/bin/ruff" format --check .
stage mypy "$VENV/bin/mypy"
stage imports "$VENV/bin/lint-imports"
stage pytest run_pytest
report
