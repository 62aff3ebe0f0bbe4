"""From a ``Command`` to a running process: the shim's command line, its report, and errors in plain words."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from miles_agents.agent.process_exit import Exit
from miles_agents.errors import EnvironmentFault

EXEC_SHIM = Path(__file__).with_name("exec_shim.py")
STARTED = b"exec\n"


class CannotStart(EnvironmentFault):
    """A command could not be executed: not found, not executable, no permission, no resources."""

    code = "E-PROC-001"


@dataclass(frozen=True)
class Command:
    """What to run, and how.

    Attributes:
        argv: Program (looked up in ``env["PATH"]`` if it has no slash) and arguments.
        env: The complete environment; nothing is added.
        cwd: Working directory.
        log_path: Appended to by stdout and stderr; created with mode 0600.
        pass_fds: Descriptors that the command inherits, under the same numbers.
        cpus: CPUs to run on; by default those of ``numa_node``, if given.
        numa_node: Memory comes from this node only.
        oom_score_adj: Raised to this, so that the kernel prefers children to the agent when memory runs out.
        core_dumps: Whether a crash writes a core file, as the inherited limit allows.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log_path: Path
    pass_fds: tuple[int, ...] = ()
    cpus: tuple[int, ...] | None = None
    numa_node: int | None = None
    oom_score_adj: int = 500
    core_dumps: bool = False


def launch(command: Command, error_fd: int) -> int:
    """Fork and exec the shim, which reports on ``error_fd``. Returns the pid, unreaped. Raises ``OSError``."""
    env_fd = os.memfd_create("environment")
    log_fd = -1
    try:
        _write_all(env_fd, "\0".join(f"{name}={value}" for name, value in command.env.items()))
        log_fd = open_log(command.log_path)
        process = subprocess.Popen(
            [*_shim_argv(command, error_fd, env_fd), *command.argv],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=(*command.pass_fds, error_fd, env_fd),
            start_new_session=True,
        )
    finally:
        os.close(env_fd)
        if log_fd >= 0:
            os.close(log_fd)
    # The pidfd reaps it. Popen must not: it would take the exit status at some later Popen().
    process.returncode = 0
    return process.pid


def open_log(path: Path) -> int:
    """A descriptor for a child's output. Raises ``OSError``."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def no_resources(command: Command, error: OSError) -> CannotStart:
    """The machine refused before the command was even looked at."""
    return CannotStart(
        f"cannot start {command.argv[0]}",
        evidence=f"{error}; log file {command.log_path}",
        advice="Make the log directory writable, and look at the limits on processes and open files.",
        argv=list(command.argv),
        errno=error.errno,
    )


def settle_options(command: Command) -> dict[str, str]:
    """What ``exec_shim.settle`` is told."""
    return {
        "cwd": str(command.cwd),
        "cpus": ",".join(map(str, command.cpus or ())),
        "numa": "" if command.numa_node is None else str(command.numa_node),
        "oom_score_adj": str(command.oom_score_adj),
        "core_dumps": str(int(command.core_dumps)),
    }


def _shim_argv(command: Command, error_fd: int, env_fd: int) -> list[str]:
    options = {"parent": os.getpid(), "error_fd": error_fd, "env_fd": env_fd, **settle_options(command)}
    pairs = [f"{name}={value}" for name, value in options.items()]
    return [sys.executable, "-I", "-S", str(EXEC_SHIM), *pairs, "--"]


def check(command: Command) -> None:
    """Refuse what exec cannot carry. Raises ``CannotStart``."""
    bad = [name for name, value in command.env.items() if not name or "=" in name or "\0" in name + value]
    if not command.argv or any("\0" in argument for argument in command.argv) or bad:
        raise CannotStart(
            f"cannot start {command.argv[:1]}",
            evidence=f"argv={list(command.argv)!r}; environment names that cannot be passed: {bad}",
            advice="Give a program, and arguments and variables without NUL characters, names without '='.",
            argv=list(command.argv),
            errno=errno.EINVAL,
        )


def _write_all(fd: int, text: str) -> None:
    with open(os.dup(fd), "wb") as file:
        file.write(os.fsencode(text))
    os.lseek(fd, 0, os.SEEK_SET)


async def read_report(fd: int, timeout_s: float) -> bytes:
    """All that is written to a pipe until it closes; what came so far after ``timeout_s``. Closes ``fd``."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    closed: asyncio.Future[None] = loop.create_future()
    chunks: list[bytes] = []

    def on_readable() -> None:
        chunks.append(os.read(fd, 4096))
        if not chunks[-1] and not closed.done():
            closed.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        await asyncio.wait({closed}, timeout=timeout_s)
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return b"".join(chunks) if closed.done() else b"timeout 0\n"


def explain(command: Command, said: bytes, ended: Exit | None, start_s: float) -> CannotStart:
    """Turn the shim's report into an error for people."""
    program = command.argv[0]
    path = command.env.get("PATH", "(not set)")
    words = said.removeprefix(STARTED).split()
    stage, number = (words[0].decode(), int(words[1])) if len(words) == 2 else ("died", 0)
    reason = os.strerror(number) if number else ""
    if stage == "exec":
        advice = _exec_advice(command, number)
    elif stage == "chdir":
        reason, advice = f"{reason}: working directory {command.cwd}", "Give a working directory that exists."
    elif stage == "timeout":
        reason, advice = f"not executing after {start_s} s", "Look at the load and the disks of this node."
    else:
        how = ended.describe() if ended is not None else "did not end"
        reason, advice = f"{stage}: {reason or how}", f"Read the end of {command.log_path}."
    return CannotStart(
        f"cannot start {program}: {reason}",
        evidence=f"argv={list(command.argv)!r}\nerrno={number} at {stage}\nPATH={path}\nlog file {command.log_path}",
        advice=advice,
        argv=list(command.argv),
        errno=number,
        path=path,
    )


def _exec_advice(command: Command, number: int) -> str:
    program = command.argv[0]
    there = shutil.which(program, mode=os.F_OK, path=command.env.get("PATH", os.defpath))
    if number == errno.ENOENT and there:
        return f"Install the interpreter that the first line of {there} names, or the loader that it needs."
    if number == errno.ENOENT:
        return f"Install {program}, or put its directory into PATH on this node."
    if number == errno.EACCES:
        return f"Make {there or program} executable for this user (chmod +x; a mount without noexec)."
    if number == errno.ENOEXEC:
        return f"Give {there or program} a first line like #!/bin/sh, or a build for this machine."
    return "Look up the errno in execve(2)."
