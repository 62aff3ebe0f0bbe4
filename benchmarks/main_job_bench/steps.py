"""Which runs answer which question, in which order, and the directories that they share."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from main_job_bench import ours, peer, update
from main_job_bench.figures import OURS, OURS_WIDE, PEERS, TRL, TRL_WIDE, Results
from main_job_bench.processes import RunFailed, adopt_orphans, environment, python, run
from main_job_bench.sizes import Size

ITERATION, AGAINST_TRL, UPDATE = "iteration", "trl", "update"
QUESTIONS = {ITERATION: (OURS,), AGAINST_TRL: (OURS, OURS_WIDE, TRL, TRL_WIDE), UPDATE: (UPDATE,)}
"""Runs of each, by column."""

_TITLES = {
    OURS: "ours, 1 rank",
    OURS_WIDE: "ours, a rank per core",
    TRL: "TRL, 1 thread",
    TRL_WIDE: "TRL, a thread per core",
    UPDATE: "weight update",
}
_WIDE = (OURS_WIDE, TRL_WIDE)
_WRITE_S = 300.0
_RUN_S = {"reference": 3600.0, "quick": 600.0}


@dataclass(frozen=True)
class Step:
    """One run."""

    name: str
    round: int

    def __str__(self) -> str:
        return f"{_TITLES[self.name]}, round {self.round + 1}"


def why_not(question: str) -> str:
    """Why a question cannot be answered here; nothing if it can."""
    reasons = [ours.why_not(), *([peer.why_not()] if question == AGAINST_TRL else [])]
    return "; ".join(filter(None, reasons))


class Bench:
    """Takes the steps. A context manager: its directory goes at the end, unless it is to be kept."""

    def __init__(self, size: Size, threads: int, results: Results, *, keep: Path | None = None) -> None:
        self.size, self.threads, self.results, self.keep = size, threads, results, keep
        self.directory = Path()
        self._deadline_s = _RUN_S[size.name]
        self._written: dict[str, Path] = {}

    def __enter__(self) -> Bench:
        adopt_orphans()
        if self.keep is None:
            self.directory = Path(tempfile.mkdtemp(prefix="mjb-"))
        else:
            self.directory = self.keep.resolve()
            self.directory.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.keep is None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def plan(self, questions: Sequence[str], rounds: int) -> list[Step]:
        """Sides in turn, each round begun by another one; the update once, at the end."""
        asked = (name for question in questions if question != UPDATE for name in QUESTIONS[question])
        names = [name for name in dict.fromkeys(asked) if self.threads > 1 or name not in _WIDE]
        found = []
        for number in range(rounds):
            first = number % max(1, len(names))
            found += [Step(name, number) for name in names[first:] + names[:first]]
        return found + [Step(UPDATE, 0)] * (UPDATE in questions)

    def take(self, step: Step) -> str:
        """Returns what was said if it failed, or nothing."""
        scratch = self.directory / f"{step.name}-{step.round}"
        try:
            scratch.mkdir()
            self._take(step, scratch)
        except RunFailed as error:
            self.results.failures.append(f"{step}: {str(error).splitlines()[-1]}")
            return str(error)
        return ""

    def _take(self, step: Step, scratch: Path) -> None:
        if step.name == UPDATE:
            size = update.sized(self.size)
            directory = self._workload("update", size)
            self.results.updates += update.measure(size, directory, scratch, deadline_s=self._deadline_s)
            return
        directory = self._workload("job", self.size)
        width = self.threads if step.name in _WIDE else 1
        if step.name in PEERS:
            made = peer.measure(
                self.size, step.name, directory, scratch, num_threads=width, deadline_s=self._deadline_s
            )
        else:
            layout = ours.Layout(step.name, ranks=width, engines=width)
            made = ours.measure(self.size, layout, directory, scratch, deadline_s=self._deadline_s)
        self.results.runs.append(made)

    def _workload(self, name: str, size: Size) -> Path:
        """Model and prompts, written once."""
        if name not in self._written:
            path = self.directory / name
            path.mkdir()
            command = python("-m", "main_job_bench.workload", str(path), json.dumps(size.as_json()))
            run(command, env=environment(self.threads), log_path=path / "log", deadline_s=_WRITE_S)
            self._written[name] = path
        return self._written[name]
