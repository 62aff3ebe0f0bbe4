"""Everything that a run records: metrics.jsonl always, and the trackers that the flags turn on.

Consumes: metrics of iterations and evaluations, from the training loop. Produces: lines of metrics.jsonl, orders to the
process of the trackers. Waits for: that process to begin (milliseconds) and to finish (with a deadline). Invariant:
recording neither waits nor raises: a run is no worse for a full disk or a server that is gone.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.tracking.continuation import Remembered, places, read_remembered, write_remembered
from miles.tracking.metrics_file import MetricsFile
from miles.tracking.process import TrackerProcess
from miles.tracking.secrets import for_people
from miles.tracking.trace import TraceFile
from miles.tracking.tracker import AXES, EVAL_AXIS, ROLLOUT_AXIS, TRAIN_AXIS, RunInfo
from miles.tracking.trackers import chosen, settings_of
from miles.utils.metric_utils import compute_rollout_step, numbers_of

logger = logging.getLogger(__name__)

FINISH_S = 60.0
"""How long trackers may write what is left after a run."""
FINISH_INTERRUPTED_S = 10.0
_VERSIONS = ("miles", "torch", "sglang", "megatron-core", "transformers")


class Tracking:
    """See the module's docstring.

    Args:
        config: The resolved config, without secrets.
        run_dir: Of the run.
        say: Takes lines for the terminal.
        secrets: By their keys in the config; for trackers alone.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        say: Callable[[str], None],
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.say = say
        self._secrets = dict(secrets or {})
        self._file = MetricsFile(run_dir, say)
        self.trace = TraceFile(run_dir, say)
        self._process: TrackerProcess | None = None
        self._remembered: Remembered = {}
        self._checkpoints: Path | None = None
        self._steps_per_rollout = 1

    async def open(self) -> None:
        """Start the trackers' process, if there are trackers: it imports their libraries while the run starts."""
        names = chosen(self.config)
        if not names:
            return
        # Variables of this process last: secrets that are given to us are not among those that --env gives to others.
        env = {**os.environ, **(self.config.get("env") or {})}
        if "wandb" in names and (self.config.get("wandb_mode") or env.get("WANDB_MODE")) == "offline":
            env.setdefault("WANDB_ERROR_REPORTING", "false")  # offline: to its makers, too
        log = self.run_dir / "logs" / "trackers.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._process = await TrackerProcess.start(names, log=log, env=env, say=self.say, remember=self._remember)
        except OSError as error:
            self.say(f"trackers cannot start: {error}. The run goes on; metrics.jsonl has every metric")

    def begin(self, run_id: str, start_rollout_id: int) -> None:
        """The run begins, or goes on from a checkpoint."""
        config = self.config
        before = {}
        if start_rollout_id > 0:
            before = read_remembered(places(config.get("load"), str(self.run_dir)))
        self._remembered = dict(before)
        self._steps_per_rollout = int(config.get("num_steps_per_rollout") or 1)
        rollout_step = self._rollout_step(start_rollout_id)
        run = RunInfo(
            run_id=run_id,
            name=self.run_dir.name,
            run_dir=str(self.run_dir),
            config=for_people(config),
            start_rollout_id=start_rollout_id,
            first_steps={ROLLOUT_AXIS: rollout_step, TRAIN_AXIS: start_rollout_id * self._steps_per_rollout},
            settings={**settings_of(config), **self._secrets},
            versions=_versions(),
        )
        limits = {"tensorboard": config.get("tensorboard_queue_size")}
        self._send({"do": "begin", "run": run.as_dict(), "before": before, "limits": limits})

    def write(
        self,
        event: str,
        rollout_id: int,
        rollouts_done: int,
        metrics: Mapping[str, float],
        steps_of_it: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Metrics of an iteration (``rollout``) or of an evaluation (``eval``).

        ``steps_of_it``: ``train/...`` of each optimizer step of an iteration that has several. Trackers draw these,
        and not their means, which are among ``metrics``.
        """
        step = self._rollout_step(rollout_id)
        steps = {ROLLOUT_AXIS: step}
        if event == "eval":
            steps = {EVAL_AXIS: step, ROLLOUT_AXIS: step}
        if TRAIN_AXIS in metrics:
            steps[TRAIN_AXIS] = int(metrics[TRAIN_AXIS])
        axis = EVAL_AXIS if event == "eval" else ROLLOUT_AXIS
        for row in steps_of_it:
            self._file.write("step", rollout_id, rollouts_done, row)
        self._file.write(event, rollout_id, rollouts_done, {**metrics, axis: step})
        interval = int(self.config.get("tensorboard_log_interval") or 1)
        if event != "eval" and rollout_id % interval:
            return
        drawn = {name for row in steps_of_it for name in row}
        for row in steps_of_it:
            self._record({TRAIN_AXIS: int(row[TRAIN_AXIS])}, row)
        self._record(steps, {name: value for name, value in metrics.items() if name not in drawn})

    def examples(self, rollout_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A few answers of an evaluation."""
        if rows:
            self._send({"do": "examples", "step": self._rollout_step(rollout_id), "rows": [dict(row) for row in rows]})

    def saved(self, directory: str) -> None:
        """A checkpoint was written below this directory."""
        self._checkpoints = Path(directory)
        if self._remembered:
            write_remembered(self._checkpoints, self._remembered)

    async def close(self, how: str) -> None:
        """The run has ended: ``finished``, ``failed`` or ``interrupted``."""
        self._file.close()
        self.trace.close()
        if self._process is None:
            return
        for path in (self.run_dir / "config.json", self._file.path):
            if path.exists():
                self._send({"do": "artefact", "path": str(path)})
        process, self._process = self._process, None
        await process.finish(how, FINISH_INTERRUPTED_S if how == "interrupted" else FINISH_S)

    def _record(self, steps: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        numbers = {name: value for name, value in numbers_of(metrics).items() if name not in AXES}
        self._send({"do": "log", "steps": steps, "metrics": numbers, "time": time.time()})

    def _send(self, order: Mapping[str, Any]) -> None:
        if self._process is not None:
            self._process.send(order)

    def _remember(self, name: str, remembered: dict[str, Any]) -> None:
        if remembered:
            self._remembered[name] = remembered
            for directory in filter(None, (self.run_dir, self._checkpoints)):
                write_remembered(directory, self._remembered)

    def _rollout_step(self, rollout_id: int) -> int:
        return compute_rollout_step(Namespace(**self.config), rollout_id)


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
