"""``miles submit [--nodes N ...] FLAGS of train.py``: a readable Slurm job script of a run, submitted by ``sbatch``.

``--dry-run`` prints the script and submits nothing; ``--script FILE`` keeps it. Flags of ``train.py`` are read before
anything is submitted, so that a misspelt one costs no time in the queue; what depends on the nodes is checked there.
Secrets (``--wandb-key``) reach the job in its environment and never stand in the script.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miles.flags.entry import table_for
from miles.flags.parse import parse
from miles.flags.problems import FlagProblems
from miles.tracking.secret_names import is_secret
from miles.tracking.secrets import as_variables, split_argv
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_OK
from miles_agents.errors import ConfigError, EnvironmentFault, MilesError

_SBATCH_S = 60.0
_PASSED = {
    "nodes": "number of nodes (default: --actor-num-nodes)",
    "partition": "partition (queue)",
    "account": "account to charge",
    "qos": "quality of service",
    "time": "time limit, such as 8:00:00",
    "gpus-per-node": "GPUs of each node",
    "cpus-per-task": "CPUs of each node (default: whole nodes, with --exclusive)",
    "mem": "memory of each node",
    "constraint": "features that nodes must have",
    "nodelist": "these nodes",
    "exclude": "not these nodes",
    "reservation": "reservation",
    "job-name": "name of the job",
    "output": "file for the output",
}
"""Options of ``sbatch`` that have a meaning for a run; ``--sbatch`` gives any other."""


class BadSubmitFlag(ConfigError):
    """Flags of ``miles submit`` that cannot work."""

    code = "E-SLURM-005"


class NotSubmitted(EnvironmentFault):
    """``sbatch`` took no job."""

    code = "E-SLURM-006"


@dataclass(frozen=True)
class Job:
    """What a job script is made of.

    Attributes:
        options: Of ``sbatch``, by name without dashes; without a value: None.
        train: The words of ``train.py``, without secrets.
        python, script: Interpreter and ``train.py``.
        cwd: Where it runs.
        path: ``PYTHONPATH``.
    """

    options: Mapping[str, str | None]
    train: Sequence[str]
    python: str = sys.executable
    script: str = "train.py"
    cwd: str = "."
    path: str = ""
    further: Sequence[str] = field(default=())


def main(argv: Sequence[str]) -> int:
    """Write and submit; returns the exit code."""
    options, train = _parser().parse_known_args([*argv])
    try:
        train, secrets = split_argv(train)
        text = job_script(_job(options, train))
        if options.script:
            _keep(Path(options.script), text)
        if options.dry_run:
            sys.stdout.write(text)
            return EXIT_OK
        sys.stdout.write(submit(text, {**os.environ, **as_variables(secrets)}))
    except (BadSubmitFlag, FlagProblems) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_CONFIG
    except (MilesError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return EXIT_OK


def _keep(path: Path, text: str) -> None:
    """For its user alone: flags may tell of places that others need not know."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        os.fchmod(fd, 0o600)  # also of a file that was there
        file.write(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles submit",
        allow_abbrev=False,
        description="Write a Slurm job script of a run and submit it. All further flags are those of train.py.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--script", metavar="FILE", help="keep the script here")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="a further option of sbatch")
    for name, text in _PASSED.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    return parser


def _job(options: argparse.Namespace, train: Sequence[str]) -> Job:
    """Raises FlagProblems, BadSubmitFlag."""
    parsed = parse(train, table_for(train))
    if parsed.problems and not any(
        flag in parsed.typed for flag in ("rollout_function_path", "custom_generate_function_path")
    ):
        raise FlagProblems(parsed.problems)
    for dest in ("hosts", "hostfile", "nodes"):
        if parsed.typed.get(dest):
            raise BadSubmitFlag(
                f"--{dest} has no meaning in a job", evidence="Slurm names the nodes",
                advice="Leave it out; --nodelist asks Slurm for certain nodes.",
            )  # fmt: skip
    if parsed.typed.get("launcher") not in (None, "slurm"):
        raise BadSubmitFlag(
            f"--launcher {parsed.typed['launcher']} has no meaning in a job",
            evidence="its agents are started with srun", advice="Leave it out.",
        )  # fmt: skip
    for name, _, value in (str(word).partition("=") for word in parsed.typed.get("env") or ()):
        if is_secret(name, value):
            raise BadSubmitFlag(
                f"--env {name} would stand in the job script", evidence="Slurm keeps scripts, and shows them",
                advice=f"Export {name} where you submit; `train.py --dry-run` names the variables that are passed on.",
            )  # fmt: skip
    given = {name: getattr(options, name.replace("-", "_")) for name in _PASSED}
    for value in [*filter(None, given.values()), *options.sbatch]:
        if not value.isprintable():
            raise BadSubmitFlag(
                f"{value!r} is no value of sbatch's", advice="Leave out line breaks and other controls."
            )
    wanted: dict[str, str | None] = {name: value for name, value in given.items() if value is not None}
    wanted.setdefault("nodes", str(parsed.typed.get("actor_num_nodes") or 1))
    if not str(wanted["nodes"]).isdecimal() or int(str(wanted["nodes"])) < 1:
        raise BadSubmitFlag(f"--nodes {wanted['nodes']} is no number of nodes", advice="Give a number from 1.")
    wanted.setdefault("job-name", "miles")
    wanted.setdefault("output", "%x-%j.log")
    if "cpus-per-task" not in wanted:
        wanted["exclusive"] = None
    here = Path.cwd()
    words = list(train) if "launcher" in parsed.typed else ["--launcher", "slurm", *train]
    script = Path(__file__).resolve().parents[2] / "train.py"
    command = [str(script)] if script.exists() else ["-m", "miles_launcher.train"]
    return Job(wanted, [*command, *words], cwd=str(here), path=os.environ.get("PYTHONPATH", ""), further=options.sbatch)


def job_script(job: Job) -> str:
    """The text. Pure."""
    lines = ["#!/bin/bash", "# A job of `miles submit`; it may be changed and given to sbatch by hand."]
    options = {**job.options, "ntasks-per-node": "1"}
    lines += [
        f"#SBATCH --{name}" + (f"={_word(value)}" if value is not None else "") for name, value in options.items()
    ]
    lines += [
        "#SBATCH --no-kill",  # a node that fails is the run's to answer: it ends with the reason, or goes on
        "#SBATCH --no-requeue",
        *(f"#SBATCH {option}" for option in job.further),
        "",
        "set -eu",
        f"cd {shlex.quote(job.cwd)}",
        *([f"export PYTHONPATH={shlex.quote(job.path)}"] if job.path else []),
        "",
        "# It starts an agent on each node with srun. Slurm's signals reach the run itself, which ends in good order.",
        f"exec {shlex.quote(job.python)} {_folded(job.train)}",
        "",
    ]
    return "\n".join(lines)


def _word(value: str) -> str:
    """As ``sbatch`` reads it: it knows double quotes, and what stands behind a backslash as it is."""
    plain = value.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    return f'"{plain}"' if any(letter.isspace() or letter in "\"'\\#" for letter in value) else value


def _folded(words: Sequence[str]) -> str:
    """A flag with its values in each line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines if line)


def submit(text: str, env: Mapping[str, str]) -> str:
    """Give it to ``sbatch``; what that said. Raises NotSubmitted."""
    advice = "Do what sbatch says; `miles submit --dry-run` shows the script."
    # A job that was submitted from within another one must not take its settings for defaults.
    own = {
        name: value
        for name, value in env.items()
        if not name.startswith(("SLURM_", "SBATCH_", "SRUN_")) or name == "SLURM_CONF"
    }
    try:
        done = subprocess.run(
            ["sbatch", "--export=ALL"],
            input=text,
            capture_output=True,
            text=True,
            timeout=_SBATCH_S,
            env=own,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSubmitted("sbatch cannot be run", evidence=str(error), advice=advice) from None
    if done.returncode:
        raise NotSubmitted(
            "sbatch took no job", evidence=done.stderr.strip() or f"exit code {done.returncode}", advice=advice
        )
    return done.stdout
