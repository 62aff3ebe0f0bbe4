"""``python train.py FLAGS``: flags to a config in a process of its own, then the job. This process loads no torch.

Exit codes: ``miles.training.exit_codes``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from miles.flags.problems import FlagProblems, Problem, ResolverFailed
from miles.tracking.secrets import as_variables, cover_argument, split_argv, take_variables
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from miles_agents.errors import MilesError

RESOLVE_S = 300.0
"""Deadline of the process that resolves flags. Most of it is for SGLang's parser, which is read once per version."""

_TAIL_LINES = 30
_ADD_FLAGS = ("--rollout-function-path", "--custom-generate-function-path")


@dataclass(frozen=True)
class Answer:
    """What the resolving process found. ``config`` is None if ``problems`` or ``error`` says why.

    ``help``: about the flags that user code adds, where that was asked for.
    """

    config: dict[str, Any] | None = None
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    error: Mapping[str, Any] = field(default_factory=dict)
    help: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line to its end; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        return show_help(arguments)
    for secret in split_argv(arguments)[1].values():
        cover_argument(secret)
    given = list(arguments)
    arguments += take_variables(os.environ)  # of a job script; no process of the run inherits them
    _find_user_code()
    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with err.status("reading the flags"):
            answer = resolve(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except MilesError as error:
        err.print(Text(str(error)))
        return EXIT_FAILED
    config = told(answer, out, err)
    if config is None:
        return int(answer.error.get("exit_code", EXIT_BAD_CONFIG))
    if config["dry_run"]:
        from miles_launcher.dry_run import show_plan

        return show_plan(config, out, given)
    return start(config)


def show_help(arguments: Sequence[str]) -> int:
    """All flags; where user code is named that may add some, those too, which a process of its own asks for."""
    from miles.flags.help import render_help
    from miles.flags.table import table

    width = shutil.get_terminal_size((120, 40)).columns
    sys.stdout.write(render_help(table(), width))
    if not any(word.partition("=")[0] in _ADD_FLAGS for word in arguments):
        return EXIT_OK
    sys.stdout.flush()
    os.environ["COLUMNS"] = str(width)
    try:
        answer = resolve(["--help", *(word for word in arguments if word not in {"-h", "--help"})])
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    if answer.error:
        sys.stderr.write(f"{answer.error['text']}\n")
        return int(answer.error["exit_code"])
    sys.stdout.write(f"\n{answer.help}\n" if answer.help else "")
    return EXIT_OK


def _find_user_code() -> None:
    """User code is found where the command is given, too: this process's path is that of the whole run."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def start(config: dict[str, Any]) -> int:
    """Run the job of a resolved config on the nodes of its launcher."""
    from miles.training.errors import exit_code
    from miles.training.job import run
    from miles_agents.agent.main import raise_file_limit
    from miles_launcher.launchers import nodes_of

    try:
        nodes = nodes_of(config)
        raise_file_limit()  # each host takes a handful
    except MilesError as error:
        sys.stderr.write(f"{error}\n")
        return exit_code(error)
    return run(config, nodes)


def resolve(argv: Sequence[str], *, timeout_s: float = RESOLVE_S) -> Answer:
    """Ask the short-lived process.

    Raises:
        ResolverFailed: It crashed, or did not answer in time.
    """
    command, env = resolving(argv)
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s, env=env)
    except subprocess.TimeoutExpired as late:
        raise resolver_failed(f"it did not answer in {timeout_s:g} s", late.stderr) from None
    return read_answer(done.returncode, done.stdout, done.stderr)


def resolving(argv: Sequence[str], python_path: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the process; ``python_path`` is where user code is looked for first."""
    words, secrets = split_argv(argv)
    return [sys.executable, "-m", "miles.flags", *words], {**_environment(python_path), **as_variables(secrets)}


def read_answer(code: int | None, stdout: str, stderr: str) -> Answer:
    """What it said. Raises ResolverFailed if that is no answer."""
    try:
        values = json.loads(stdout)
    except ValueError:
        raise resolver_failed(f"it ended with exit code {code} and no answer", stderr) from None
    return Answer(
        config=values.get("config"),
        problems=tuple(Problem.from_dict(problem) for problem in values.get("problems", ())),
        notices=tuple(values.get("notices", ())),
        error=values.get("error", {}),
        help=values.get("help", ""),
    )


def _environment(python_path: Sequence[str]) -> dict[str, str]:
    """With the directory of the script that runs, which a module that is run does not have on its path."""
    beside = [sys.path[0]] if sys.path and Path(sys.path[0]).is_dir() else []
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*python_path, *beside, *given]))}


def resolver_failed(why: str, stderr: str | bytes | None) -> ResolverFailed:
    """The error, with the end of what it wrote."""
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or ""
    tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
    return ResolverFailed(
        "the process that reads the flags failed",
        evidence=f"{why}; it wrote:\n{tail}" if tail else f"{why}; it wrote nothing",
        advice="Run `python -m miles.flags` with the same flags, and report what it says unless your code is at fault.",
    )


def told(answer: Answer, out: Console, err: Console) -> dict[str, Any] | None:
    """The config, or None after telling why there is none. Notices are told in both cases."""
    for notice in answer.notices:
        out.print(Text(f"note: {notice}", style="dim"))
    if answer.error:
        err.print(Text(str(answer.error["text"])))
        return None
    if answer.problems:
        for problem in answer.problems:
            head, *rest = problem.lines()
            err.print(Text(head, style="bold red"))
            err.print(Text("\n".join(rest)))
        error = FlagProblems(answer.problems)
        err.print(Text(f"{error.what}\n  code: {error.code} (docs/errors.md)"))
        return None
    return answer.config


if __name__ == "__main__":
    sys.exit(main())
