# Sourced by the scripts beside it: makes .venv, or brings it up to date. Bash functions only.
#   PYTHON   the interpreter to build .venv with (default: python3.11, with which the pinned packages are tested, else
#            the first newer one on PATH)

VENV=.venv
STAMP=$VENV/.installed-for
REQUIREMENTS=scripts/requirements

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found (tried: ${PYTHON:-python3.11 to python3.14, python3})." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3 $0" >&2
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

has_nvidia_gpu() {
    [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ]
}

# install_environment EXTRAS: .venv with the package, torch, the trainer and the engine. EXTRAS are those of
# pyproject.toml. A venv whose interpreter is gone (moved checkout, upgraded Python) is made anew.
install_environment() {
    local extras=$1 python wanted
    wanted=$(cat pyproject.toml scripts/environment.sh "$REQUIREMENTS"/* | sha256sum)
    # What was installed with more extras serves fewer, too.
    if [ "$(sed -n 1p "$STAMP" 2>/dev/null)" = "$wanted" ] && sed -n 2p "$STAMP" | grep -qF "$extras" &&
        "$VENV/bin/python" -c 'import miles_agents' 2>/dev/null; then
        echo "$VENV is up to date"
        return
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) && need_venv_module "$python" && "$python" -m venv --clear "$VENV" || return
    fi
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    local pip=("$VENV/bin/python" -m pip install -q)
    if has_nvidia_gpu; then  # sglang names the torch that its kernels are built for
        "${pip[@]}" -e ".[$extras,train,rollout]" || return
    else
        install_for_cpu "$extras" || return
    fi
    printf '%s\n%s\n' "$wanted" "$extras" >"$STAMP"
}

# install_for_cpu EXTRAS: into an existing .venv. A torch of another version than the pinned one is replaced; one that
# is there in any build of that version (+cpu) stays.
install_for_cpu() {
    local pip=("$VENV/bin/python" -m pip install -q -c "$REQUIREMENTS/torch.txt")
    "${pip[@]}" -r "$REQUIREMENTS/torch.txt" || return
    "${pip[@]}" --no-deps -r "$REQUIREMENTS/cpu-no-deps.txt" || return
    "${pip[@]}" -r "$REQUIREMENTS/cpu.txt" -e ".[$1]"
}

# install_system_packages PROGRAM:PACKAGE...: from Debian's packages, those whose program is not there. Only as root, and
# only where no init system runs that would start their servers: a container, continuous integration. What stays missing
# is not an error here; tests that need it say so.
install_system_packages() {
    local pair missing=()
    for pair in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get >/dev/null; then
        echo "not installed: ${missing[*]}"
        return 0
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
        echo "could not be installed: ${missing[*]}"
}
