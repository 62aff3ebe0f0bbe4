"""One rollout through the model: passes without gradient, advantages, optimizer steps, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from miles.backends.base import ModelTag, TrainBackend
from miles.backends.training_utils import log_utils
from miles.backends.training_utils.critic import Critic
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.debug_files import dump_train_data, write_checksums
from miles.backends.training_utils.hooks import TrainerHooks, takes
from miles.backends.training_utils.loss_hub.advantages import compute_advantages_and_returns
from miles.backends.training_utils.loss_hub.losses import LOSS_COLUMNS, LogProbOutput, Losses
from miles.backends.training_utils.loss_hub.settings import (
    keeps_old_actor,
    moves_reference,
    needs_reference,
    needs_teacher,
)
from miles.backends.training_utils.old_weights import OldWeights
from miles.backends.training_utils.parallel import set_parallel_state
from miles.backends.training_utils.profiling import StepProfiler
from miles.backends.training_utils.routing import Routing
from miles.backends.training_utils.timers import Timers
from miles.rollout.hooks import BadHookResult, Hook

_Output: TypeAlias = tuple[Sequence[int], LogProbOutput]


class RolloutTrainer:
    """All of it is collective over all ranks.

    The pass for old log-probabilities is made even if a rollout is one optimizer step, where they equal those of the
    training pass: metrics compare them with the engine's. ``--skip-actor-forward-only`` leaves it out.
    """

    def __init__(self, args: Any, backend: TrainBackend, timers: Timers, critic: Critic | None = None) -> None:
        self.args = args
        self.backend = backend
        self.critic = critic
        self.timers = timers
        set_parallel_state(backend.parallel)
        self.losses = Losses(args, backend.parallel)
        self.hooks = TrainerHooks.of(args)
        self.profiler = StepProfiler(args, backend.parallel.rank)
        self.old_weights: OldWeights | None = None
        if keeps_old_actor(args):
            self.old_weights = OldWeights(lambda: backend.local_weights(trained=True), args, backend.device)
        self.step_of = (0, 0)
        """Step that is running and steps of this rollout; may be read from another thread."""
        self.last_steps: list[dict[str, float]] = []
        """``train/...`` of each step of the last rollout."""

    def train(self, rollout_id: int, fetch: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
        """Train on what ``fetch`` gives (this rank's part). Returns metrics, complete on every rank."""
        args, backend = self.args, self.backend
        parallel, device = backend.parallel, backend.device
        with self.profiler.step("train_overall"), self.timers.measure("train"):
            with self.timers.measure("data_preprocess"):
                data = RankData.from_wire(fetch())
                data.routing = Routing.of(args, data.routed_experts)
            if getattr(args, "reset_optimizer_states", False):
                backend.reset_optimizer()
            if self.critic is not None:
                with self.timers.measure("critic_values"):
                    self.critic.fill_values(data)
            self._forward_passes(data)
            compute_advantages_and_returns(args, parallel, data, device)
            if self.hooks.postprocess is not None:
                postprocess(self.hooks.postprocess, args, data)
            metrics = log_utils.rollout_metrics(data, parallel, device)
            dump_train_data(args, rollout_id, data, parallel)
            critic_metrics = self._train_critic(rollout_id, data)
            steps: list[dict[str, float]] = []
            if rollout_id >= self._num_critic_only_steps():
                with self.timers.measure("actor_train"):
                    steps = self._steps(rollout_id, data)
                if self.old_weights is not None:
                    self.old_weights.changed()
            self._update_reference(rollout_id)
        write_checksums(args, rollout_id, parallel.rank, backend.objects().model)
        self.last_steps = log_utils.by_step(rollout_id, steps)
        metrics |= critic_metrics | log_utils.mean_over_steps(steps) | log_utils.memory_metrics(device)
        if getattr(args, "log_params_norm", False):
            metrics["train/params_norm"] = log_utils.params_norm(backend)
        metrics["train/step"] = float((rollout_id + 1) * len(data.steps) - 1)
        seconds = self.timers.take()
        return metrics | seconds | log_utils.speed_metrics(args, data, parallel, device, seconds)

    def _train_critic(self, rollout_id: int, data: RankData) -> dict[str, float]:
        if self.critic is None:
            return {}

        def running(number: int) -> None:
            self.step_of = (number, len(data.steps))

        with self.timers.measure("critic_train"):
            return self.critic.train(rollout_id, data, running)

    def _num_critic_only_steps(self) -> int:
        """Rollouts in which the critic alone learns (``--num-critic-only-steps``)."""
        return 0 if self.critic is None else int(getattr(self.args, "num_critic_only_steps", 0) or 0)

    def _forward_passes(self, data: RankData) -> None:
        if needs_reference(self.args):
            with self.timers.measure("ref_log_probs"):
                self._log_probs(data, "ref", "ref_log_probs")
        if needs_teacher(self.args):
            with self.timers.measure("teacher_log_probs"):
                self._log_probs(data, "teacher", "teacher_log_probs")
        if self.losses.settings.needs_old_log_probs:
            with self.timers.measure("log_probs"), data.recording():
                self._old_log_probs(data)

    def _old_log_probs(self, data: RankData) -> None:
        """Of the actor as it is, or with ``--keep-old-actor`` of the weights that made each sample."""
        with_entropy = getattr(self.args, "use_rollout_entropy", False)
        if self.old_weights is None:
            self._log_probs(data, "actor", "log_probs", with_entropy=with_entropy)
            return
        outputs = list[_Output]()
        for version, micro_batches in self.old_weights.by_version(data).items():
            with self.old_weights.in_place(version):
                outputs += self._log_prob_pass(data, "actor", micro_batches, with_entropy=with_entropy)
        _take(data, "log_probs", outputs)

    def _update_reference(self, rollout_id: int) -> None:
        """``--ref-update-interval``: after every so many rollouts the reference is the actor as it is then."""
        if moves_reference(self.args) and (rollout_id + 1) % int(self.args.ref_update_interval) == 0:
            with self.timers.measure("ref_update"), torch.no_grad():
                weights = zip(self.backend.local_weights("ref"), self.backend.local_weights("actor"), strict=True)
                for reference, actor in weights:
                    reference.copy_(actor)

    def _log_probs(self, data: RankData, model: ModelTag, name: str, *, with_entropy: bool = False) -> None:
        """Fill a column (ranks without logits get none: they compute no loss)."""
        _take(data, name, self._log_prob_pass(data, model, data.forward, with_entropy=with_entropy))

    def _log_prob_pass(
        self, data: RankData, model: ModelTag, micro_batches: Sequence[Sequence[int]], *, with_entropy: bool
    ) -> list[_Output]:
        """Samples and output of each micro-batch; nothing on a rank without logits."""
        if self.hooks.before_log_prob is not None:
            prefix = "" if model == "actor" else f"{model}_"
            self.hooks.before_log_prob.call(self.args, self.backend.objects(model).model, prefix)
        batches = [data.micro_batch(s, self.backend.device, routed=model == "actor") for s in micro_batches]
        function = self.losses.log_prob_function(with_entropy=with_entropy)
        with self.profiler.step("train_log_probs"):
            outputs = self.backend.forward_only(batches, function, model=model)
        pairs = zip(micro_batches, outputs, strict=False)
        return [(samples, output) for samples, output in pairs if isinstance(output, LogProbOutput)]

    def _steps(self, rollout_id: int, data: RankData) -> list[dict[str, float]]:
        backend = self.backend
        names = tuple(data.columns) if self.losses.settings.loss_type == "custom_loss" else LOSS_COLUMNS
        metrics = []
        for number, step in enumerate(data.steps):
            self.step_of = (number, len(data.steps))
            batches = [data.micro_batch(s, backend.device, names, routed=True) for s in step.micro_batches]
            if self.hooks.before_train_step is not None:
                seen = backend.objects()
                self.hooks.before_train_step.call(
                    self.args, rollout_id, number, seen.model, seen.optimizer, seen.scheduler
                )
            with self.profiler.step("train_actor"):
                outcome = backend.train_step(batches, self.losses.for_step(step))
            found = log_utils.step_metrics(outcome, backend.parallel, backend.device)
            log_utils.check_finite(self.args, found, f"rollout {rollout_id}, step {number}")
            metrics.append(found | {"skipped": float(not outcome.stepped)})
        return metrics


def _take(data: RankData, name: str, outputs: Sequence[_Output]) -> None:
    """Columns of passes that went over all samples together."""
    found: dict[str, dict[int, torch.Tensor]] = {name: {}, "entropy": {}}
    for samples, output in outputs:
        found[name] |= zip(samples, output.log_probs, strict=False)
        found["entropy"] |= zip(samples, output.entropy or [], strict=False)
    for column, values in found.items():
        if values:
            data.columns[column] = [values[i].cpu() for i in range(len(data))]


def postprocess(hook: Hook, args: Any, data: RankData) -> None:
    """``--rollout-data-postprocess-path``: ``fn(args)``, or ``fn(args, rollout_data)`` if it can take two. The latter
    gets this rank's samples as a dict of lists (``RankData.as_dict``) and changes them there: loss masks, advantages,
    whatever else is per sample. Steps, and what losses are divided by, stay."""
    if not takes(hook.function, args, {}):
        hook.call(args)
        return
    seen = data.as_dict()
    hook.call(args, seen)
    try:
        data.take_over(seen)
    except (ValueError, TypeError, KeyError) as error:
        raise BadHookResult(
            f"{hook.flag} {hook.path} left rollout data that cannot be trained on",
            evidence=str(error),
            advice="Leave lists of as many entries as there are samples, and tensors of as many as there were.",
            flag=hook.flag,
        ) from error
