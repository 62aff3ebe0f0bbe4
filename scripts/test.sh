#!/usr/bin/env bash
# Everything that has to hold before a change goes in, from a bare checkout: environment, style, types, import
# rules, tests. Usage: scripts/test.sh [--fast | --long] [pytest arguments]
#   --fast   leaves out the tests marked "full" (real processes, seconds to minutes)
#   --long   with those marked "long", too: further combinations of what the others show (a quarter of an hour more)
#   PYTHON   the interpreter to build .venv with (default: python3.11, else a newer one on PATH)
#   WORKERS  processes that share the tests out among them, file by file (default: one per core, 4 at most)
# Tests start many processes and wait for them. One that fails while others run beside it is run once more, alone: what
# fails then has failed. The report names what passed only alone, so that it can be mended.
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

RUN_AGAIN_MOST=10

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

workers() {
    local cores
    cores=$(env -u OMP_NUM_THREADS nproc)  # which would obey it
    echo "${WORKERS:-$((cores < 4 ? cores : 4))}"
}

# pytest_into LOG ARGUMENTS...
pytest_into() {
    "$VENV/bin/python" -m pytest "${@:2}" "${pytest_args[@]}" 2>&1 | tee "$1"
    return "${PIPESTATUS[0]}"
}

run_pytest() {
    # Files in their order: else those with the fewest tests, which are the whole runs, come last, and one worker waits.
    pytest_into "$pytest_log" -n "$(workers)" --dist loadfile --no-loadscope-reorder && return
    local failures
    mapfile -t failures < <(grep -E '^(FAILED|ERROR) ' "$pytest_log" | cut -d' ' -f2 | sort -u)
    [ ${#failures[@]} -gt 0 ] && [ ${#failures[@]} -le "$RUN_AGAIN_MOST" ] || return 1
    printf '\n--- once more, alone\n'
    pytest_into "$again_log" --last-failed --last-failed-no-failures none || return 1
    summary+=("${failures[@]/#/passed only alone: }")
}

stage install install_environment dev,demo,trackers || report
# For tests with several hosts: networks, sshds and a Slurm of their own.
stage programs install_system_packages ip:iproute2 sshd:openssh-server ssh:openssh-client rsync:rsync \
    slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge || report
pytest_log=$(mktemp) again_log=$(mktemp)
trap 'rm -f "$pytest_log" "$again_log"' EXIT
stage ruff "$VENV/bin/ruff" check .
stage format "$VENV/bin/ruff" format --check .
stage mypy "$VENV/bin/mypy"
stage imports "$VENV/bin/lint-imports"
stage pytest run_pytest
report
