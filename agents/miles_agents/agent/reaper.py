"""The parent of an agent: ``python -I -S reaper.py [--give-up-s S] -- AGENT COMMAND...``

Keeps the one promise that an agent cannot keep for itself: when the agent is gone, however it went, nothing that it
started is left. It is a child subreaper, so whatever loses its parent below it becomes its own child, whatever that
process did to its session, title or environment. It ends after the last of them has: **its exit is the proof
that the node is clean**, and its exit code is the agent's (128 + n for signal n), or ``EXIT_NOT_CLEAN``.

Consumes: TERM, INT, HUP (passed on to the agent; an INT typed at the terminal is not, because the terminal has sent
it to the agent as well), QUIT (kills the agent without grace), and the ends of children.
Produces: a lifeline, a pipe whose read end the agent inherits (``MILES_REAPER_FD``); its end of file tells the agent
that the reaper died. stdin, stdout and stderr are the agent's too, so they close only when the node is clean.
With ``MILES_REAPER_REMOVES`` it removes that directory when the node is clean; with ``MILES_REAPER_SAYS`` it then
writes that line to stdout: its word, for a launcher that does not see its exit.
Waits for: the agent, without a deadline (this is its job); then for its children to end, until there is none or
nothing has ended for ``give_up_s``.

One thread; signals are blocked and fetched, so no handler ever runs. A script: it imports nothing of the project and
little else (about 6 MiB). ``_signal`` is the C half of ``signal``, without ``enum``.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found,unused-ignore]
import ctypes
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

LIFELINE_VARIABLE = "MILES_REAPER_FD"
SAYS_VARIABLE = "MILES_REAPER_SAYS"
REMOVES_VARIABLE = "MILES_REAPER_REMOVES"
EXIT_NOT_CLEAN = 98
EXIT_CANNOT_EXEC = 127
EXIT_USAGE = 64
GIVE_UP_S = 10.0
MAX_CLEANING_S = 60.0
PR_SET_CHILD_SUBREAPER = 36
SI_KERNEL = 0x80
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def watch_reaper(loop: asyncio.AbstractEventLoop, on_death: Callable[[], None]) -> Callable[[], None]:
    """In the agent: call ``on_death`` once when the reaper dies. Returns a function that stops watching.

    Without a reaper (``MILES_REAPER_FD`` unset) it does nothing. The variable is removed, and the descriptor is
    not passed on to children.
    """
    text = os.environ.pop(LIFELINE_VARIABLE, "")
    if not text:
        return lambda: None
    fd = int(text)
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    watching = [fd]

    def stop() -> None:
        while watching:
            loop.remove_reader(watching[0])
            os.close(watching.pop())

    def on_readable() -> None:
        try:
            if os.read(fd, 1):
                return
        except BlockingIOError:
            return
        stop()
        on_death()

    loop.add_reader(fd, on_readable)
    return stop


def say(text: str) -> None:
    """One line on stderr, if anybody still reads it."""
    try:
        os.write(2, f"reaper: {text}\n".encode(errors="replace"))
    except OSError:
        return


def read_file(path: str) -> str:
    """A small file of /proc, or "" if it is gone."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def parse_stat(pid: int) -> tuple[str, str, int] | None:
    """Name, state and parent of a process, or None if it is gone."""
    head, _, tail = read_file(f"/proc/{pid}/stat").rpartition(")")
    fields = tail.split()
    return (head.partition("(")[2], fields[0], int(fields[1])) if fields else None


def children_of(pid: int) -> list[int]:
    """Pids of the direct children, zombies too."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    if not os.path.exists("/proc/self/task/" + str(os.getpid()) + "/children"):
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        return [other for other in pids if (stat := parse_stat(other)) is not None and stat[2] == pid]
    return [int(child) for thread in threads for child in read_file(f"/proc/{pid}/task/{thread}/children").split()]


def kill_child(pid: int, parent: int) -> None:
    """SIGKILL a process that is a child of ``parent``; never another one that got its number."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        stat = parse_stat(pid)  # after the open: see process_tree.py
        if stat is not None and stat[2] == parent:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        return
    finally:
        os.close(fd)


def kill_below(pid: int) -> None:
    """SIGKILL everything below, parents first. Goes deeper than the own children because one of them may hang."""
    queue = [pid]
    for parent in queue:
        for child in children_of(parent):
            kill_child(child, parent)
            queue.append(child)


def reap(wanted: int) -> tuple[bool, int, int | None]:
    """Reap whatever has ended. Returns whether children are left, how many ended, and the status of ``wanted``."""
    count, status = 0, None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False, count, status
        if pid == 0:
            return True, count, status
        count += 1
        if pid == wanted:
            status = ended


def clean(give_up_s: float) -> bool:
    """Kill and reap until there is no child left. False: something does not end; it has been named."""
    started = progressed = time.monotonic()
    while True:
        kill_below(os.getpid())
        left, count, _ = reap(0)
        if not left:
            return True
        now = time.monotonic()
        progressed = now if count else progressed
        if now - progressed > give_up_s or now - started > MAX_CLEANING_S:
            name_survivors(os.getpid())
            return False
        signal.sigtimedwait([signal.SIGCHLD], 0.05)


def name_survivors(pid: int) -> None:
    """One line for each process that is still there."""
    queue = [pid]
    for parent in queue:
        for child in children_of(parent):
            queue.append(child)
            stat = parse_stat(child)
            if stat is not None:
                wchan = read_file(f"/proc/{child}/wchan")
                say(f"pid {child} ({stat[0]}) does not end: state {stat[1]}, in {wchan or 'unknown'}")


def start_agent(command: list[str], lifeline: int, mask: Iterable[int]) -> int:
    """Fork and exec the agent. Returns its pid; a failed exec is an exit code 127 with a line on stderr."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.set_inheritable(lifeline, True)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvpe(command[0], command, os.environ | {LIFELINE_VARIABLE: str(lifeline)})  # noqa: S606
    except OSError as error:
        say(f"cannot start the agent {command[0]}: {error.strerror} (PATH={os.environ.get('PATH', '')})")
    finally:
        os._exit(EXIT_CANNOT_EXEC)


def attend(agent: int) -> int:
    """Pass signals on until the agent has ended. Returns its wait status."""
    while True:
        info = signal.sigwaitinfo([*FORWARDED, signal.SIGCHLD])
        if info.si_signo == signal.SIGCHLD:
            status = reap(agent)[2]
            if status is not None:
                return status
        elif info.si_signo == signal.SIGQUIT:
            os.kill(agent, signal.SIGKILL)  # not reaped yet, so the number is still its own
        elif info.si_signo != signal.SIGINT or info.si_code != SI_KERNEL:
            os.kill(agent, info.si_signo)


def main(arguments: list[str]) -> int:
    """Run the agent, then clean up. Returns the exit code."""
    if "--" not in arguments or arguments[-1] == "--":
        say("usage: reaper.py [--give-up-s SECONDS] -- COMMAND...")
        return EXIT_USAGE
    cut = arguments.index("--")
    give_up_s = float(arguments[1]) if arguments[0] == "--give-up-s" else GIVE_UP_S
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        say("cannot adopt orphans: prctl(PR_SET_CHILD_SUBREAPER) failed")
        return EXIT_USAGE
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited SIG_IGN would discard exit statuses
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*FORWARDED, signal.SIGCHLD])
    word, directory = os.environ.pop(SAYS_VARIABLE, ""), os.environ.pop(REMOVES_VARIABLE, "")
    lifeline, _held_until_exit = os.pipe()
    agent = start_agent(arguments[cut + 1 :], lifeline, mask)
    os.close(lifeline)
    status = attend(agent)
    if not clean(give_up_s):
        return EXIT_NOT_CLEAN
    remove(directory)
    give_word(word)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def remove(directory: str) -> None:
    """The directory that was made for this node, if any."""
    if not directory:
        return
    import shutil  # after the run: it would cost memory during it

    shutil.rmtree(directory, ignore_errors=True)


def give_word(word: str) -> None:
    """Write it to stdout, on a line of its own, if anybody still reads that."""
    if not word:
        return
    try:
        os.write(1, f"\n{word}\n".encode())
    except OSError:
        return


def guarded_main() -> int:
    """``main``, but no bug of this script passes for the agent's exit code."""
    try:
        return main(sys.argv[1:])
    except BaseException:  # noqa: BLE001  # the boundary of the process
        sys.excepthook(*sys.exc_info())
        return EXIT_NOT_CLEAN


if __name__ == "__main__":
    os._exit(guarded_main())
