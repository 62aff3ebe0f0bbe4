"""One system, one case, one round: ``python -m runtime_bench.child SYSTEM CASE FD EFFORT``.

Figures go to the pipe ``FD`` as lines of JSON; whatever the system prints goes where it likes. The parent ends this
process with SIGTERM, which unwinds the case's contexts; should the parent die, the kernel sends the same.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are done in a round."""

    num_warm_up: int
    num_calls: int
    num_batches: int
    num_group_calls: int
    num_bulk: int
    num_kills: int
    num_slow_kills: int
    num_freezes: int


EFFORTS = {
    "full": Effort(500, 2000, 5, 100, 5, 5, 2, 3),
    "quick": Effort(100, 300, 2, 20, 2, 2, 1, 1),
}


class Reporter:
    """Tells the parent. ``began``: ``time.perf_counter`` before the system's library was imported."""

    def __init__(self, fd: int, system: str, began: float) -> None:
        self.began = began
        self._system = system
        os.set_inheritable(fd, False)  # what the system starts must not hold the pipe open
        self._pipe = os.fdopen(fd, "w", buffering=1)

    def sample(self, metric: str, value: float | None, *, column: str = "") -> None:
        """One figure; None: the cap was reached."""
        self._line(sample={"column": column or self._system, "metric": metric, "value": value})

    def note(self, text: str) -> None:
        """A circumstance worth knowing, told once however many say it."""
        self._line(note=text)

    def done(self) -> None:
        """Nothing more will come."""
        self._line(done=True)

    def _line(self, **content: Any) -> None:
        self._pipe.write(json.dumps(content) + "\n")


def main(argv: list[str]) -> int:
    """Run the case."""
    system, case, fd, effort = argv
    _end_with_parent()
    reporter = Reporter(int(fd), system, time.perf_counter())
    module = importlib.import_module(f"runtime_bench.system_{system}")
    module.CASES[case](reporter, EFFORTS[effort])
    reporter.done()
    return 0


def _end_with_parent() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
