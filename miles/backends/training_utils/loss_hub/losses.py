"""The losses: policy gradient with clipping (GRPO), supervised fine-tuning, and the user's own.

All of them see one micro-batch's logits and give its part of the step's loss, in the sense of
``miles.backends.base.LossOutput``: parts are added up and nothing else. What divides is in ``reduction.Reducer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from miles.backends.base import LossFunction, LossOutput, MicroBatch, ParallelState
from miles.backends.training_utils.collectives import share_places
from miles.backends.training_utils.data import StepPlan, pieces, response_rows, response_tokens
from miles.backends.training_utils.loss_hub.further_tokens import further_tokens_loss
from miles.backends.training_utils.loss_hub.math_utils import (
    compute_approx_kl,
    compute_policy_loss,
    likelihood_ratio,
    log_probs_and_entropy,
)
from miles.backends.training_utils.loss_hub.reduction import Reducer
from miles.backends.training_utils.loss_hub.sequence_level import clipped_value_loss, gspo_kl, opsm_mask
from miles.backends.training_utils.loss_hub.settings import LossSettings
from miles.backends.training_utils.loss_hub.user_functions import BadLossFunction, UserFunctions

LOSS_COLUMNS = (
    "rollout_mask_sums",
    "advantages",
    "returns",
    "values",
    "log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "opd_reverse_kl",
)
"""What a micro-batch of a training step carries; for a custom loss, everything there is."""

Metrics = dict[str, torch.Tensor]


@dataclass
class LogProbOutput:
    """Of a pass without gradient: float32 ``[R_i]`` for each sample of a micro-batch, on the device."""

    log_probs: list[torch.Tensor]
    entropy: list[torch.Tensor] | None


class Losses:
    """Functions of logits for a backend, with the run's settings and the rank's tensor-parallel group in them."""

    def __init__(self, args: Any, parallel: ParallelState) -> None:
        self.args = args
        self.settings = LossSettings.from_args(args)
        self.parallel = parallel
        self._users = UserFunctions(args, parallel)

    def for_step(self, step: StepPlan) -> LossFunction:
        """The loss of one optimizer step's micro-batches."""
        kinds: dict[str, Callable[[torch.Tensor, MicroBatch, Reducer], LossOutput]] = {
            "policy_loss": self._policy_loss,
            "sft_loss": self._sft_loss,
            "custom_loss": self._users_loss,
        }
        kind = kinds[self.settings.loss_type]

        def loss(logits: torch.Tensor, batch: MicroBatch) -> LossOutput:
            return kind(logits, batch, Reducer(batch, step, per_token=self.settings.per_token))

        whole = _computed_twice(loss) if self.settings.recompute else loss

        def with_further_tokens(logits: torch.Tensor, batch: MicroBatch) -> LossOutput:
            output = whole(logits, batch)
            if not batch.further_logits:
                return output
            reduce = Reducer(batch, step, per_token=self.settings.per_token)
            further = further_tokens_loss(batch, reduce, self.settings, self.parallel)
            batch.further_logits = []  # the batch stays until the step ends: its logits need not
            total = output.loss + self.settings.mtp_factor * further
            return LossOutput(total, output.metrics | {"mtp_loss": further.detach()})

        return with_further_tokens

    def log_prob_function(self, *, with_entropy: bool) -> Callable[[torch.Tensor, MicroBatch], LogProbOutput]:
        """For ``forward_only``."""

        def log_probs(logits: torch.Tensor, batch: MicroBatch) -> LogProbOutput:
            values, entropy = self.log_probs(logits, batch, with_entropy=with_entropy)
            lengths = batch.response_lengths
            return LogProbOutput(pieces(values, lengths), None if entropy is None else pieces(entropy, lengths))

        return log_probs

    def log_probs(
        self, logits: torch.Tensor, batch: MicroBatch, *, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 ``[sum R_i]`` each, of the response tokens, at the rollout's temperature. With context parallelism,
        too: what follows sees all tokens on every rank, so sequence-level terms need nothing of their own."""
        layout = batch.layout
        if layout is None:
            rows, targets = response_rows(batch)
        else:
            local_rows, places = (part.to(logits.device) for part in layout.predicting_rows(batch.response_lengths))
            every = response_tokens(batch)
            rows, targets = local_rows, every[places]
        values, entropy = log_probs_and_entropy(
            logits,
            rows,
            targets,
            temperature=self.settings.temperature,
            vocab_size=self.settings.vocab_size,
            tp_group=self.parallel.tp_group,
            chunk_size=self.settings.chunk_size,
            with_entropy=with_entropy,
        )
        if layout is None or layout.cp_size == 1:
            return values, entropy
        group = self.parallel.cp_group
        shared = share_places(values, places, len(every), group)
        return shared, None if entropy is None else share_places(entropy, places, len(every), group)

    def values(self, output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """float32 ``[sum R_i]``, of a critic's output ``[rows, 1]``."""
        layout = batch.layout
        if layout is None:
            return output[response_rows(batch)[0], 0]
        rows, places = (part.to(output.device) for part in layout.predicting_rows(batch.response_lengths))
        own = output[rows, 0]
        if layout.cp_size == 1:
            return own
        return share_places(own, places, sum(batch.response_lengths), self.parallel.cp_group)

    def value_loss_for(self, step: StepPlan) -> LossFunction:
        """The critic's loss of one optimizer step's micro-batches."""

        def loss(output: torch.Tensor, batch: MicroBatch) -> LossOutput:
            reduce = Reducer(batch, step, per_token=self.settings.per_token)
            values = self.values(output, batch)
            old, returns = (_column(batch, name, values) for name in ("values", "returns"))
            per_token, clipped = clipped_value_loss(values, old, returns, clip=self.settings.value_clip)
            total = reduce(per_token) + 0.0 * output.sum()
            found = total.detach()
            return LossOutput(total, {"loss": found, "value_loss": found, "value_clipfrac": reduce(clipped)})

        return loss

    def _sft_loss(self, logits: torch.Tensor, batch: MicroBatch, reduce: Reducer) -> LossOutput:
        """-log p of the response tokens."""
        log_probs, entropy = self.log_probs(logits, batch, with_entropy=self.settings.observe_entropy)
        loss = reduce(-log_probs)
        watched = {} if entropy is None else {"entropy_loss": reduce(entropy.detach())}
        return LossOutput(loss, {"loss": loss.detach()} | watched)

    def _policy_loss(self, logits: torch.Tensor, batch: MicroBatch, reduce: Reducer) -> LossOutput:
        """Clipped policy gradient - entropy_coef * H + kl_loss_coef * KL(policy || reference).

        Sources: Schulman et al., Proximal policy optimization (2017); Ye et al., dual clip (2020); Shao et al.,
        DeepSeekMath (2024) for GRPO; Zheng et al., GSPO (2025), whose ratio is one per sequence.
        """
        settings = self.settings
        log_probs, entropy = self.log_probs(logits, batch, with_entropy=True)
        assert entropy is not None
        old = self._old_log_probs(batch, log_probs)
        log_ratio = _trained_and_finite(old - log_probs, reduce)
        ppo_kl = log_ratio
        if settings.per_sequence:
            ppo_kl = gspo_kl(reduce.split(log_ratio), batch.loss_masks, log_ratio)
            ppo_kl = _trained_and_finite(ppo_kl, reduce)
        advantages = _trained_and_finite(_column(batch, "advantages", log_probs), reduce)
        per_token, clipped, ratio = clipped_policy_loss(ppo_kl, advantages, settings)
        masked: Metrics = {}
        if settings.use_opsm:
            kept = opsm_mask(
                reduce.split(log_ratio), reduce.split(advantages), batch.loss_masks,
                delta=settings.opsm_delta, like=log_ratio,
            )  # fmt: skip
            per_token, masked = per_token * kept, {"opsm_clipfrac": reduce(1.0 - kept)}
        pg_loss, metrics = self._corrected(per_token, ppo_kl, log_probs, batch, reduce)
        metrics |= masked
        entropy_loss = reduce(entropy if settings.entropy_coef else entropy.detach())
        loss = pg_loss - settings.entropy_coef * entropy_loss if settings.entropy_coef else pg_loss
        if settings.use_kl_loss:
            kl = self._kl(batch, log_probs, old, reduce)
            metrics["kl_loss"] = reduce(kl.detach())
            loss = loss + settings.kl_loss_coef * reduce(kl) if settings.kl_loss_coef else loss
        metrics |= {
            "loss": loss.detach(),
            "pg_loss": pg_loss.detach(),
            "entropy_loss": entropy_loss.detach(),
            "pg_clipfrac": reduce(clipped),
            "ppo_kl": reduce(ppo_kl.detach()),
            "ess_ratio": _effective_sample_size(ratio.detach(), reduce),
        }
        if "opd_reverse_kl" in batch.columns:
            metrics["opd_reverse_kl"] = reduce(_column(batch, "opd_reverse_kl", log_probs))
        return LossOutput(loss, metrics | _distance_to_engine(batch, log_probs, reduce))

    def _old_log_probs(self, batch: MicroBatch, log_probs: torch.Tensor) -> torch.Tensor:
        if self.settings.use_rollout_log_probs:
            return _column(batch, "rollout_log_probs", log_probs)
        if self.settings.skip_actor_forward_only:
            return log_probs.detach()
        return _column(batch, "log_probs", log_probs)

    def _kl(self, batch: MicroBatch, log_probs: torch.Tensor, old: torch.Tensor, reduce: Reducer) -> torch.Tensor:
        # Before anything is exponentiated: what overflows there has no gradient that could be masked afterwards.
        log_probs, old, reference = (
            torch.where(reduce.active, values, 0.0)
            for values in (log_probs, old, _column(batch, "ref_log_probs", log_probs))
        )
        importance = (log_probs - old).exp() if self.settings.use_unbiased_kl else None
        kl = compute_approx_kl(log_probs, reference, self.settings.kl_loss_type, importance)
        return _trained_and_finite(kl, reduce)

    def _corrected(
        self,
        per_token: torch.Tensor,
        ppo_kl: torch.Tensor,
        log_probs: torch.Tensor,
        batch: MicroBatch,
        reduce: Reducer,
    ) -> tuple[torch.Tensor, Metrics]:
        """The policy-gradient loss, after the correction for the engine's probabilities if one is asked for."""
        settings, masks, metrics = self.settings, batch.loss_masks, Metrics()
        wanted = settings.use_tis or settings.get_mismatch_metrics
        if wanted and batch.sample_positions:
            trained = batch.columns.get("log_probs") or pieces(log_probs.detach(), batch.response_lengths)
            engine = _present(batch, "rollout_log_probs")
            per_token, masks, found = self._users.corrected(per_token, batch, trained, engine)
            metrics = {name: reduce(value.detach()) for name, value in found.items()}
            metrics["ois"] = reduce((-ppo_kl).detach().exp())
        users = self._users.reducer(batch, masks, per_token=settings.per_token) if batch.sample_positions else None
        if users is not None:
            return users(per_token) / reduce.divisor, metrics
        return reduce.with_masks(per_token, masks), metrics

    def _users_loss(self, logits: torch.Tensor, batch: MicroBatch, reduce: Reducer) -> LossOutput:
        """``--custom-loss-function-path``. ``sum_of_sample_mean`` and the result are before the division by the step's
        samples (or tokens)."""
        if not batch.sample_positions:
            return LossOutput(0.0 * logits.sum(), {})
        loss, metrics = self._users.loss(batch, logits, lambda values: reduce(values) * reduce.divisor)
        loss = loss / reduce.divisor
        return LossOutput(loss, {"loss": loss.detach()} | {n: value / reduce.divisor for n, value in metrics.items()})


def _computed_twice(loss: LossFunction) -> LossFunction:
    """``--recompute-loss-function``: what the loss would keep for its gradient is computed again then."""

    def wrapped(logits: torch.Tensor, batch: MicroBatch) -> LossOutput:
        found: dict[str, torch.Tensor] = {}

        def compute(logits: torch.Tensor) -> torch.Tensor:
            output = loss(logits, batch)
            found.update({name: value.detach() for name, value in output.metrics.items()})
            return output.loss

        result: torch.Tensor = checkpoint(compute, logits, use_reentrant=False)
        return LossOutput(result, dict(found))

    return wrapped


def clipped_policy_loss(
    ppo_kl: torch.Tensor, advantages: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``compute_policy_loss`` with the run's bounds, and the ratio ``exp(-ppo_kl)``."""
    bounds = settings.eps_clip, settings.eps_clip_high, settings.eps_clip_c
    return *compute_policy_loss(ppo_kl, advantages, *bounds), likelihood_ratio(ppo_kl)


def _effective_sample_size(ratio: torch.Tensor, reduce: Reducer) -> torch.Tensor:
    """Per sample ``(sum w)^2 / (N sum w^2)`` with the ratios w of its N trained tokens: 1 if all weigh the same."""
    values, counts = [], []
    for weights, active in zip(reduce.split(ratio), reduce.split(reduce.mask), strict=True):
        weighted = weights * active
        count = float(active.sum())
        values.append(weighted.sum().square() / (max(count, 1.0) * weighted.square().sum().clamp(min=1e-8)))
        counts.append(count)
    return reduce.per_sample(values, counts)


def _distance_to_engine(batch: MicroBatch, log_probs: torch.Tensor, reduce: Reducer) -> Metrics:
    """How far the trainer's probabilities of the chosen tokens are from those that the engine reported."""
    if "rollout_log_probs" not in batch.columns:
        return {}
    engine = _column(batch, "rollout_log_probs", log_probs)
    trainer = _column(batch, "log_probs", log_probs) if "log_probs" in batch.columns else log_probs.detach()
    return {
        "train_rollout_logprob_abs_diff": reduce((trainer - engine).abs()),
        "train_rollout_kl": reduce(compute_approx_kl(engine, trainer, "low_var_kl")),
    }


def _trained_and_finite(values: torch.Tensor, reduce: Reducer) -> torch.Tensor:
    return torch.where(torch.isfinite(values) & reduce.active, values, 0.0)


def _present(batch: MicroBatch, name: str) -> list[torch.Tensor]:
    if name not in batch.columns:
        raise BadLossFunction(
            f"the loss needs {name}, which the samples do not have",
            evidence=f"they have {', '.join(sorted(batch.columns)) or 'nothing'}",
            advice="Let the generate function fill it in, or leave out the flag that asks for it.",
        )
    return batch.columns[name]


def _column(batch: MicroBatch, name: str, like: torch.Tensor) -> torch.Tensor:
    """Flat ``[sum R_i]``. A micro-batch without samples has none of anything."""
    if not batch.sample_positions:
        return torch.zeros_like(like)
    return torch.cat([values.to(like.dtype) for values in _present(batch, name)])
