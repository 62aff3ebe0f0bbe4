"""Runs inside every new child, before its command: ``python -I -S exec_shim.py KEY=VALUE... -- COMMAND...``

Not imported by the agent: a script of its own that prepares the process and then becomes the command by exec, so
that all of it holds before the command's first instruction. (Zygotes import it: their children are prepared by the same
code.) What survives an exec: the parent-death signal, the
subreaper flag, affinity, memory policy, ``oom_score_adj``, limits and the signal mask.

Consumes: keys on its command line; the environment of the command from a memory file (``env_fd``; NUL between
entries), so that neither secrets nor an ``LD_PRELOAD`` meant for the command touch this interpreter.
Produces: on ``error_fd`` (closed by a successful exec) ``STARTED`` just before exec, and ``<stage> <errno>`` after a
failure. End of file without ``STARTED`` means that the child died before.

Imports little, because its start is part of every start (about 20 ms, 7 of them ``ctypes``): ``_signal`` is the C
half of ``signal``, without ``enum``.
"""

import _signal as signal  # type: ignore[import-not-found,unused-ignore]
import ctypes
import os
import resource
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MPOL_BIND = 2
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
STARTED = b"exec\n"
EXIT_NOT_STARTED = 127
EXIT_PARENT_GONE = 126
MAX_OPEN_FILES = 1 << 20
"""Not the hard limit where that is a billion: programs exist that close every possible descriptor at start."""


class Failure(Exception):
    """A stage failed with an errno; the agent turns it into an error for people."""

    def __init__(self, stage: str, error: OSError) -> None:
        super().__init__(stage)
        self.stage = stage
        self.errno = error.errno or 0


def say(text: str) -> None:
    """One line into the child's log (its stderr)."""
    os.write(2, f"exec_shim: {text}\n".encode())


def bind_life_to_parent(parent: int) -> None:
    """Die with the parent's main thread; be the one that orphans below come to."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_CHILD_SUBREAPER, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise Failure("prctl", OSError(ctypes.get_errno(), "prctl"))
    if os.getppid() != parent:  # it died before the signal was armed, so the signal will never come
        os._exit(EXIT_PARENT_GONE)


def parse_cpus(text: str) -> set[int]:
    """``"0-3,8"`` -> {0, 1, 2, 3, 8}, the kernel's list format."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def bind_cpus_and_memory(cpus: str, numa_node: str) -> None:
    """Place the process. A machine that cannot do it costs speed only, so it is a line in the log."""
    try:
        if numa_node and not cpus:
            with open(f"/sys/devices/system/node/node{int(numa_node)}/cpulist") as file:
                wanted = parse_cpus(file.read()) & os.sched_getaffinity(0)
        else:
            wanted = parse_cpus(cpus)
        if wanted:
            os.sched_setaffinity(0, wanted)
    except OSError as error:
        say(f"cannot run on cpus {cpus or f'of NUMA node {numa_node}'}: {error}; runs anywhere")
    if numa_node:
        bind_memory(int(numa_node))


def bind_memory(node: int) -> None:
    """Allocate on one NUMA node only (``set_mempolicy``), as ``numactl --membind`` does."""
    number = SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        say(f"cannot bind memory to NUMA node {node} on {os.uname().machine}; allocates anywhere")
        return
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = node // bits + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // bits] = 1 << (node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told, hence the + 1.
    if libc.syscall(number, MPOL_BIND, mask, ctypes.c_ulong(words * bits + 1)) != 0:
        say(f"cannot bind memory to NUMA node {node}: {os.strerror(ctypes.get_errno())}; allocates anywhere")


def raise_oom_score(score: int) -> None:
    """Make the kernel's out-of-memory killer prefer this process to the agent. Never lowers (needs privileges)."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            if int(file.read()) < score:
                file.seek(0)
                file.write(str(score))
    except OSError as error:
        say(f"cannot raise oom_score_adj to {score}: {error}")


def set_limits(core_dumps: bool) -> None:
    """As many open files as allowed; core dumps only where asked for (they delay the news of a death)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if not core_dumps:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def reset_signals() -> None:
    """Default actions and an empty mask: an inherited ``nohup`` or a blocked TERM must not reach the command."""
    for number in signal.valid_signals():
        if signal.getsignal(number) is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def read_environment(fd: int) -> dict[str, str]:
    """The command's environment, complete."""
    with open(fd, "rb") as file:
        entries = os.fsdecode(file.read()).split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def settle(options: dict[str, str]) -> None:
    """What a new child does for itself once its life is bound to its parent's, in the order that loses nothing."""
    if options["cwd"]:
        try:
            os.chdir(options["cwd"])
        except OSError as error:
            raise Failure("chdir", error) from None
    bind_cpus_and_memory(options["cpus"], options["numa"])
    raise_oom_score(int(options["oom_score_adj"]))
    set_limits(core_dumps=options["core_dumps"] == "1")


def main(arguments: list[str]) -> None:
    """Prepare, then become the command."""
    cut = arguments.index("--")
    options = dict(argument.split("=", 1) for argument in arguments[:cut])
    error_fd = int(options["error_fd"])
    os.set_inheritable(error_fd, False)
    try:
        bind_life_to_parent(int(options["parent"]))
        env = read_environment(int(options["env_fd"]))
        settle(options)
        reset_signals()
        os.write(error_fd, STARTED)
        try:
            os.execvpe(arguments[cut + 1], arguments[cut + 1 :], env)  # noqa: S606  # becoming it is the job
        except OSError as error:
            raise Failure("exec", error) from None
    except Failure as failure:
        os.write(error_fd, f"{failure.stage} {failure.errno}\n".encode())
    os._exit(EXIT_NOT_STARTED)


if __name__ == "__main__":
    main(sys.argv[1:])
