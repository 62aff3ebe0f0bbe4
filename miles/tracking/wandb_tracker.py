"""Weights & Biases, online or offline. Needs the package ``wandb``.

A run that goes on from a checkpoint goes on with the same run id, also offline: ``wandb sync`` puts the parts together.
The key is given to the library as a setting, so that it writes no ``~/.netrc``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from miles.tracking.tracker import EVAL_AXIS, ROLLOUT_AXIS, TRAIN_AXIS, Begun, Examples, Outcome, Point, RunInfo

_SAME = ("project", "team", "host")


class WandbTracker:
    """See the module's docstring."""

    name: ClassVar[str] = "Weights & Biases"

    def __init__(self) -> None:
        self._run: Any = None
        self._is_offline = False

    def begin(self, run: RunInfo, before: Mapping[str, Any]) -> Begun:
        """Open a run, or go on with that of ``--wandb-run-id``, or with that of the checkpoint."""
        import wandb

        settings = run.settings
        known = identity(run, before)
        goes_on = known["run_id"] in (settings.get("wandb_run_id"), before.get("run_id"))
        mode = settings.get("wandb_mode") or os.environ.get("WANDB_MODE")
        directory = Path(settings.get("wandb_dir") or os.environ.get("WANDB_DIR") or run.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        special = {"api_key": settings.get("wandb_key"), "base_url": known["host"]}
        self._run = wandb.init(
            project=known["project"],
            entity=known["team"],
            group=settings.get("wandb_group"),
            name=known["name"],
            id=known["run_id"],
            resume="allow" if goes_on else None,
            dir=str(directory),
            mode=mode,
            config={**run.config, "versions": dict(run.versions)},
            settings=wandb.Settings(
                console="off", silent=True, **{key: value for key, value in special.items() if value}
            ),
        )
        self._is_offline = bool(self._run.offline)
        self._define_axes()
        told = self._run.url or f"{self._run.settings.sync_dir} (offline)"
        return Begun(known, f"Weights & Biases: {told}")

    def _define_axes(self) -> None:
        define = self._run.define_metric
        for axis in (ROLLOUT_AXIS, TRAIN_AXIS, EVAL_AXIS):
            define(axis, hidden=True)
        define("*", step_metric=ROLLOUT_AXIS)
        define("train/*", step_metric=TRAIN_AXIS)
        define("eval/*", step_metric=EVAL_AXIS)

    def log(self, point: Point) -> None:
        """One row, with its place on each axis."""
        self._run.log({**point.metrics, **point.steps})

    def examples(self, examples: Examples) -> None:
        """A table."""
        import wandb

        names = ["dataset", "prompt", "response", "label", "reward"]
        rows = [[str(row.get(name)) for name in names] for row in examples.rows]
        self._run.log({"eval/examples": wandb.Table(columns=names, data=rows), EVAL_AXIS: examples.step})

    def artefact(self, path: Path) -> None:
        """A file of the run."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self, outcome: Outcome) -> str:
        """Upload what is left; a run that has failed or was interrupted is marked so."""
        import wandb

        directory = Path(self._run.settings.sync_dir)
        self._run.finish(exit_code=0 if outcome.how == "finished" else 1)
        wandb.teardown()
        return f"Weights & Biases: upload it with: wandb sync {directory}" if self._is_offline else ""


def identity(run: RunInfo, before: Mapping[str, Any]) -> dict[str, Any]:
    """``project``, ``team``, ``host``, ``run_id`` and ``name``: those of the run that is continued, if it is in the
    same place; ``--wandb-run-id`` comes first."""
    settings = run.settings
    place = {
        "project": settings.get("wandb_project") or os.environ.get("WANDB_PROJECT") or "miles",
        "team": settings.get("wandb_team") or os.environ.get("WANDB_ENTITY"),
        "host": settings.get("wandb_host") or os.environ.get("WANDB_BASE_URL"),
    }
    continued = before if before and all(before.get(key) == place[key] for key in _SAME) else {}
    run_id = settings.get("wandb_run_id") or continued.get("run_id") or secrets.token_hex(4)
    is_same = run_id == continued.get("run_id")
    return {**place, "run_id": run_id, "name": continued["name"] if is_same else _name(run, run_id)}


def _name(run: RunInfo, run_id: str) -> str:
    """As it is shown: ``--wandb-run-name``, else ``--wandb-group``, else that of the run directory; with the run id
    behind it unless ``--disable-wandb-random-suffix`` says that the name is to be stable."""
    settings = run.settings
    base = settings.get("wandb_run_name") or settings.get("wandb_group") or run.name
    return f"{base}_{run_id}" if settings.get("wandb_random_suffix", True) else str(base)
