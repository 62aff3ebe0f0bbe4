"""The ``miles`` command: ``miles agent`` on each node; ``status``, ``logs``, ``stack`` and ``stop`` for the person who
started a run.

``miles agent`` is on the start-up path of every node, so only the standard library and two small modules are loaded
for it; then it becomes the reaper, which starts the agent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import miles_agents
from miles_agents.errors import ConfigError, EnvironmentFault, MilesError
from miles_agents.store.ref import MIN_STORE_BYTES
from miles_agents.timings import Timings

KEY_FD_VARIABLE = "MILES_KEY_FD"
"""Environment variable with the number of an inherited pipe that holds the key bundle, one line, then end of file."""

KEY_DEADLINE_S = 60.0
"""How long ``miles agent`` waits for the key on stdin: a starter that hangs must not leave it behind."""

# A key line has a few hundred bytes. One page also fits into any pipe at once, so handing it on cannot block.
_KEY_BYTES = 4096

_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RUN_MODULES = "miles_controller.controller,miles_launcher.local"
"""What a script that defines actors imports of ours, and so do its workers when they load the class."""

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TIMING_FLAGS = ("beat_s", "suspect_s", "fence_s", "dead_s")


class InvalidAgentFlag(ConfigError):
    """A flag of ``miles agent`` has a value that cannot work."""

    code = "E-CLI-001"


class KeyNotReceived(ConfigError):
    """No usable key bundle arrived on stdin or in the key file."""

    code = "E-CLI-002"


class UnsafeKeyFile(EnvironmentFault):
    """The key file could have been read or written by somebody else."""

    code = "E-CLI-003"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for an error that was told on stderr (docs/console.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _PASSED_ON:
        return _PASSED_ON[arguments[0]](arguments[1:])  # with parsers of their own, which an agent must not load
    options = _parser().parse_args(arguments)
    try:
        if options.command == "agent":
            _agent(options, arguments[arguments.index("agent") + 1 :])
        return _of_a_run(options)
    except MilesError as error:
        print(error, file=sys.stderr)
        _remove_copied_code()
        return 2


def _of_a_run(options: argparse.Namespace) -> int:
    """Commands about a run that is alive."""
    if options.command == "status":
        from miles_launcher.status import print_status

        print_status(options.run, as_json=options.json)
    elif options.command == "logs":
        return _logs(options)
    elif options.command == "stack":
        from miles_launcher.runs import find_run, order

        told = order(find_run(options.run), "/stack", {"rank": options.rank})
        print(f"{told['rank']} on {told['node']}, pid {told['pid']}\n\n{told['stack']}")
    elif options.command == "stop":
        from miles_launcher.stop import stop

        return stop(options.run, timeout_s=options.timeout_s)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from miles_launcher.logs import print_logs

    lines = None if options.lines == "all" else int(options.lines)
    try:
        print_logs(options.run, options.process, lines=lines, follow=options.follow)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the last flush finds somebody
    return 0


def _remove_copied_code() -> None:
    """What was copied here for an agent that does not start; else its reaper does it (``remote_start``)."""
    directory = os.environ.get("MILES_REAPER_REMOVES")
    if directory:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


def _flags(arguments: list[str]) -> int:
    from miles_launcher.flags import main as list_flags

    return list_flags(arguments)


def _convert(arguments: list[str]) -> int:
    from miles.convert import main as convert

    return convert(arguments)


def _doctor(arguments: list[str]) -> int:
    from miles_launcher.doctor import main as doctor

    return doctor(arguments)


def _submit(arguments: list[str]) -> int:
    from miles_launcher.submit import main as submit

    return submit(arguments)


_PASSED_ON: dict[str, Callable[[list[str]], int]] = {
    "flags": _flags,
    "convert": _convert,
    "doctor": _doctor,
    "submit": _submit,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles", allow_abbrev=False, description="RL post-training without Ray.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    agent = commands.add_parser(
        "agent",
        allow_abbrev=False,
        help="serve this machine to a controller",
        description="Serve this machine to a controller. The key bundle is read from stdin, whose end later tells the "
        "agent that its starter is gone; with --key-file it is read from there.",
    )
    # Checked by us: argparse would name the missing flag and not the misspelt one that was meant for it.
    agent.add_argument(
        "--controller",
        metavar="ADDRESS",
        help="where the controller listens: tcp://HOST:PORT, or unix:///PATH on its machine (needed)",
    )
    agent.add_argument("--key-file", metavar="PATH", help="file with the key bundle (mode 0600, owned by you)")
    agent.add_argument("--node", metavar="NAME", help="name of this node (default: the one in the key bundle)")
    agent.add_argument("--cpu-slots", type=int, metavar="N", help="slots offered where there is no GPU")
    agent.add_argument("--interface", metavar="IF", help="network interface, or its address, for this node's ports")
    agent.add_argument("--run-dir", metavar="DIR", help="directory for logs and journals")
    agent.add_argument(
        "--preload",
        metavar="MODULES",
        help='modules (commas between them) to import early, once for all workers: "torch"',
    )
    agent.add_argument(
        "--store-bytes", type=int, metavar="N", help="shared memory for the store (default: a tenth of the node's)"
    )
    agent.add_argument(
        "--join-timeout-s", type=float, metavar="SECONDS", help="give up when the controller does not answer (60)"
    )
    defaults = Timings()
    for name in _TIMING_FLAGS:
        agent.add_argument(_flag(name), type=float, metavar="SECONDS", help=f"default {getattr(defaults, name):g}")

    status = commands.add_parser("status", allow_abbrev=False, help="show what a run on this machine does")
    status.add_argument("--run", metavar="RUN", help="run id, or run directory (needed if several run)")
    status.add_argument("--json", action="store_true", help="print the snapshot as JSON")

    _add_commands_of_a_run(commands)

    # For --help only: their own parsers take what follows.
    commands.add_parser("flags", add_help=False, help="list the flags of train.py, or say why one is refused")
    commands.add_parser("doctor", add_help=False, help="look at this machine, or at the hosts of a run, for faults")
    commands.add_parser("submit", add_help=False, help="write a Slurm job script of a run, and submit it")
    commands.add_parser("convert", add_help=False, help="convert checkpoints between Hugging Face and torch_dist")
    return parser


def _add_commands_of_a_run(commands: Any) -> None:
    logs = commands.add_parser("logs", allow_abbrev=False, help="show the output of a run's processes")
    logs.add_argument("process", nargs="*", help="trainer-0, engine-0, rollout-0, controller, ...; none: list them")
    logs.add_argument("-f", "--follow", action="store_true", help="wait for more, also of a process started again")
    logs.add_argument("-n", "--lines", type=_line_count, default="50", metavar="N", help="last lines (50), or: all")
    stack = commands.add_parser("stack", allow_abbrev=False, help="show where the Python of a rank is, all threads")
    stack.add_argument("rank", nargs="?", default="", help="trainer[1], trainer-1, or 1")
    stop = commands.add_parser("stop", allow_abbrev=False, help="end a run in good order, and wait for that")
    stop.add_argument("--timeout-s", type=float, default=180.0, metavar="SECONDS", help="how long to wait (180)")
    for parser in (logs, stack, stop):
        parser.add_argument("--run", metavar="RUN", help="run id, or run directory (needed if several run)")


def _line_count(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError("a number of lines, or: all")
    return text


class _Version(argparse.Action):
    """Looks the version up only when asked: reading package metadata takes longer than the rest of the start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"miles {version('miles')}")
        parser.exit()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _agent(options: argparse.Namespace, passed_on: list[str]) -> NoReturn:
    """Validate, take the key, become the reaper (which starts the agent with the same flags)."""
    _check(options)
    line = _key_from_file(Path(options.key_file)) if options.key_file else _key_from_stdin()
    _check_key(line, options.key_file or "stdin")
    os.environ[KEY_FD_VARIABLE] = str(_pipe_holding(line))
    reaper = Path(miles_agents.__file__).parent / "agent" / "reaper.py"
    agent = [sys.executable, "-m", "miles_agents.agent", "--also-import", _RUN_MODULES, *passed_on]
    os.execv(sys.executable, [sys.executable, "-I", "-S", str(reaper), "--", *agent])  # noqa: S606  # no shell


def _check(options: argparse.Namespace) -> None:
    """Refuse what the agent could not use, before anything is started.

    Raises:
        InvalidAgentFlag: A flag's value is out of its range.
        InvalidTimings: The timings are out of order.
    """
    if options.controller is None:
        raise InvalidAgentFlag(
            "--controller is missing",
            evidence="an agent dials its controller",
            advice="Give the address that the controller printed: --controller tcp://HOST:PORT.",
        )
    address = _ADDRESS.fullmatch(options.controller)
    is_local = options.controller.startswith("unix:///")
    if not is_local and (not address or not 0 < int(address[2]) < 65536):
        raise InvalidAgentFlag(
            f"--controller {options.controller!r} is not an address",
            evidence="expected tcp://HOST:PORT with a port from 1 to 65535, or unix:///PATH on its own machine",
            advice="Copy the address that the controller printed, for example tcp://10.0.0.1:7100.",
        )
    if options.node is not None and not _NODE.fullmatch(options.node):
        raise InvalidAgentFlag(
            f"--node {options.node!r} cannot name a node",
            evidence="allowed are 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit",
            advice="Use the name from the hosts list, or leave --node out.",
        )
    if options.cpu_slots is not None and options.cpu_slots < 0:
        raise InvalidAgentFlag(
            f"--cpu-slots {options.cpu_slots} is no number of slots",
            evidence="a node cannot offer fewer than 0",
            advice="Give 0 or more, or leave it out for the default.",
        )
    if options.store_bytes is not None and options.store_bytes < MIN_STORE_BYTES:
        raise InvalidAgentFlag(
            f"--store-bytes {options.store_bytes} is too little",
            evidence=f"the smallest store has {MIN_STORE_BYTES}",
            advice="Give more, or leave it out for a tenth of the node's memory.",
        )
    if options.join_timeout_s is not None and options.join_timeout_s <= 0:
        raise InvalidAgentFlag(
            f"--join-timeout-s {options.join_timeout_s} is too short",
            evidence="a time above 0 is needed",
            advice="Give some seconds, or leave it out for 60.",
        )
    bad = [name for name in (options.preload or "").split(",") if name and not _MODULE.fullmatch(name)]
    if bad:
        raise InvalidAgentFlag(
            f"--preload {options.preload!r} names no modules",
            evidence=f"no module can be called {bad[0]!r}",
            advice="Give importable names with commas between them, for example --preload numpy,torch.",
        )
    Timings(**{name: value for name in _TIMING_FLAGS if (value := getattr(options, name)) is not None})


def _key_from_stdin() -> bytes:
    """One line from stdin, and not a byte more: what follows (its end) is the agent's to watch."""
    if sys.stdin is None or os.isatty(0):
        raise _no_key(
            "stdin", "stdin is a terminal or closed", "Pipe the key bundle in, or name a file with --key-file."
        )
    line = b""
    deadline = time.monotonic() + KEY_DEADLINE_S
    while not line.endswith(b"\n") and len(line) < _KEY_BYTES:
        readable, _, _ = select.select([0], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise _no_key(
                "stdin", f"no whole line within {KEY_DEADLINE_S:.0f} s", "Find out what the starter waits for."
            )
        byte = os.read(0, 1)
        if not byte:
            raise _no_key(
                "stdin",
                f"it ended after {len(line)} bytes, before a whole line",
                "Look at the starter's log: it went away before it sent the key.",
            )
        line += byte
    return line


def _key_from_file(path: Path) -> bytes:
    """The key bundle from a file that only we can read.

    Raises:
        UnsafeKeyFile: Others could read or replace it.
        KeyNotReceived: It cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _no_key(str(path), str(error), "Copy the key file to this machine (mode 0600), not as a link.") from error
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise UnsafeKeyFile(
                f"key file {path} is not private",
                evidence=f"mode {stat.S_IMODE(found.st_mode):04o}, owner uid {found.st_uid}, "
                f"this process runs as uid {os.geteuid()}; it must be a plain file, yours, mode 0600",
                advice=f"Issue a new key, because others may have read this one; then chmod 600 {path}.",
            )
        return file.read(_KEY_BYTES + 1).strip() + b"\n"


def _check_key(line: bytes, source: str) -> None:
    """The agent reads the bundle in full; here only what shows that the right thing was sent."""
    evidence = ""
    if len(line) > _KEY_BYTES:
        evidence = f"more than {_KEY_BYTES} bytes"
    elif b"\n" in line.strip():
        evidence = "more than one line"
    else:
        try:
            if not isinstance(json.loads(line), dict):
                evidence = "JSON, but not an object"
        except (ValueError, RecursionError):
            evidence = f"{len(line)} bytes that are not one line of JSON"  # never shown: it may be half a secret
    if evidence:
        raise _no_key(
            source, evidence, "Send the line that the controller issued for this node, and nothing before it."
        )


def _no_key(source: str, evidence: str, advice: str) -> KeyNotReceived:
    return KeyNotReceived(f"no key bundle from {source}", evidence=evidence, advice=advice)


def _pipe_holding(line: bytes) -> int:
    """A pipe with ``line`` in it, inherited over exec. Once read, the secret is nowhere else: neither in
    argv and environment, which others can see, nor in a file that stays."""
    read, write = os.pipe()
    os.write(write, line)
    os.close(write)
    os.set_inheritable(read, True)
    return read


if __name__ == "__main__":
    sys.exit(main())
