#!/usr/bin/env bash
# Everything that has to hold before a change goes in, from a bare checkout: environment, style, types, import
# rules, tests. Usage: scripts/test.sh [--fast | --long] [pytest arguments]
#   --fast   leaves out the tests marked "full" (real processes, seconds to minutes)
#   --long   with those marked "long", too: further combinations of what the others show (ten minutes more)
#   PYTHON   the interpreter to build .venv with (default: python3.11, else a newer one on PATH)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

. scripts/environment.sh

pytest_args=(-m "not long")
for argument in "$@"; do
    case $argument in
        --fast) pytest_args+=(-m "not full and not long") ;;
        --long) pytest_args+=(-m "") ;;
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

run_pytest() {
    "$VENV/bin/python" -m pytest "${pytest_args[@]}" 2>&1 | tee "$pytest_log"
    return "${PIPESTATUS[0]}"
}

stage install install_environment dev,demo,trackers || report
pytest_log=$(mktemp)
trap 'rm -f "$pytest_log"' EXIT
stage ruff "$VENV/bin/ruff" check .
stage format "$VENV/bin/ruff" format --check .
stage mypy "$VENV/bin/mypy"
stage imports "$VENV/bin/lint-imports"
stage pytest run_pytest
report
