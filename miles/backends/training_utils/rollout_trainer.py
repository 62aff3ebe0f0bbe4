"""One rollout through the model: passes without gradient, advantages, optimizer steps, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from miles.backends.base import ModelTag, TrainBackend
from miles.backends.training_utils import log_utils
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.loss_hub.advantages import compute_advantages_and_returns
from miles.backends.training_utils.loss_hub.losses import LOSS_COLUMNS, LogProbOutput, Losses
from miles.backends.training_utils.loss_hub.settings import needs_reference
from miles.backends.training_utils.timers import Timers


class RolloutTrainer:
    """All of it is collective over all ranks.

    The pass for old log-probabilities is made even if a rollout is one optimizer step, where they equal those of the
    training pass: metrics compare them with the engine's. ``--skip-actor-forward-only`` leaves it out.
    """

    def __init__(self, args: Any, backend: TrainBackend, timers: Timers) -> None:
        self.args = args
        self.backend = backend
        self.timers = timers
        self.losses = Losses(args, backend.parallel)
        self.step_of = (0, 0)
        """Step that is running and steps of this rollout; may be read from another thread."""

    def train(self, rollout_id: int, fetch: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
        """Train on what ``fetch`` gives (this rank's part). Returns metrics, complete on every rank."""
        args, backend = self.args, self.backend
        parallel, device = backend.parallel, backend.device
        with self.timers.measure("train"):
            with self.timers.measure("data_preprocess"):
                data = RankData.from_wire(fetch())
            self._forward_passes(data)
            compute_advantages_and_returns(args, parallel, data, device)
            metrics = log_utils.rollout_metrics(data, parallel, device)
            self._dump(rollout_id, data)
            with self.timers.measure("actor_train"):
                steps = self._steps(rollout_id, data)
        metrics |= log_utils.mean_over_steps(steps)
        metrics["train/step"] = float((rollout_id + 1) * len(steps) - 1)
        seconds = self.timers.take()
        return metrics | seconds | log_utils.speed_metrics(args, data, parallel, device, seconds)

    def _forward_passes(self, data: RankData) -> None:
        if needs_reference(self.args):
            with self.timers.measure("ref_log_probs"):
                self._log_probs(data, "ref", "ref_log_probs")
        if self.losses.settings.needs_old_log_probs:
            with self.timers.measure("log_probs"):
                self._log_probs(
                    data, "actor", "log_probs", with_entropy=getattr(self.args, "use_rollout_entropy", False)
                )

    def _log_probs(self, data: RankData, model: ModelTag, name: str, *, with_entropy: bool = False) -> None:
        """Fill a column (ranks without logits get none: they compute no loss)."""
        batches = [data.micro_batch(samples, self.backend.device) for samples in data.forward]
        function = self.losses.log_prob_function(with_entropy=with_entropy)
        outputs = self.backend.forward_only(batches, function, model=model)
        found: dict[str, dict[int, torch.Tensor]] = {name: {}, "entropy": {}}
        for batch, output in zip(batches, outputs, strict=False):
            if isinstance(output, LogProbOutput):
                found[name] |= zip(batch.sample_positions, output.log_probs, strict=False)
                found["entropy"] |= zip(batch.sample_positions, output.entropy or [], strict=False)
        for column, values in found.items():
            if values:
                data.columns[column] = [values[i].cpu() for i in range(len(data))]

    def _steps(self, rollout_id: int, data: RankData) -> list[dict[str, float]]:
        backend = self.backend
        names = tuple(data.columns) if self.losses.settings.loss_type == "custom_loss" else LOSS_COLUMNS
        metrics = []
        for number, step in enumerate(data.steps):
            self.step_of = (number, len(data.steps))
            batches = [data.micro_batch(samples, backend.device, names) for samples in step.micro_batches]
            outcome = backend.train_step(batches, self.losses.for_step(step))
            found = log_utils.step_metrics(outcome, backend.parallel, backend.device)
            log_utils.check_finite(self.args, found, f"rollout {rollout_id}, step {number}")
            metrics.append(found | {"skipped": float(not outcome.stepped)})
        return metrics

    def _dump(self, rollout_id: int, data: RankData) -> None:
        """``--save-debug-train-data``, a template with ``{rollout_id}`` and ``{rank}``."""
        template = getattr(self.args, "save_debug_train_data", None)
        if not template:
            return
        rank = self.backend.parallel.rank
        path = Path(template.format(rollout_id=rollout_id, rank=rank))
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = {
            "tokens": [tokens.clone() for tokens in data.tokens],
            "loss_masks": [mask.clone() for mask in data.loss_masks],
            "response_lengths": data.response_lengths,
            "total_lengths": data.total_lengths,
            "partition": data.partition,
        }
        torch.save({"rollout_id": rollout_id, "rank": rank, "rollout_data": {**lists, **data.columns}}, path)
