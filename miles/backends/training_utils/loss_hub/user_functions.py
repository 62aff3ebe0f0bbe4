"""Losses, corrections and reducers of the user: called with the signatures of their flags, their results checked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from miles.backends.base import MicroBatch, ParallelState
from miles.backends.training_utils.hooks import trainer_hook
from miles.backends.training_utils.loss_hub.corrections import Correction, vanilla_tis_function
from miles.rollout.hooks import Hook
from miles_agents.errors import UserCodeError

Reduce = Callable[[torch.Tensor], torch.Tensor]


class BadLossFunction(UserCodeError):
    """A custom loss, correction or reducer returned something else than it should."""

    code = "E-TRAIN-004"


class UserFunctions:
    """Those that the flags name; without one, ours.

    Raises:
        CannotLoad, ImportFailed.
    """

    def __init__(self, args: Any, parallel: ParallelState) -> None:
        self._args = args
        self._parallel = parallel
        self._loss = trainer_hook(args, "custom_loss_function_path")
        self._correction = trainer_hook(args, "custom_tis_function_path")
        self._reducer = trainer_hook(args, "custom_pg_loss_reducer_function_path")

    def corrected(
        self,
        per_token: torch.Tensor,
        batch: MicroBatch,
        train_log_probs: list[torch.Tensor],
        rollout_log_probs: list[torch.Tensor],
    ) -> Correction:
        """``--custom-tis-function-path``, called with keywords only, or truncated importance sampling.

        Raises:
            HookFailed: It raised.
            BadLossFunction: It returned something else than (loss per token, masks, metrics).
        """
        given: dict[str, Any] = {
            "args": self._args,
            "pg_loss": per_token,
            "train_log_probs": train_log_probs,
            "rollout_log_probs": rollout_log_probs,
            "loss_masks": batch.loss_masks,
            "total_lengths": batch.total_lengths,
            "response_lengths": batch.response_lengths,
            "parallel_state": self._parallel,
            "max_seq_lens": max_seq_lens(batch),
        }
        if self._correction is None:
            return vanilla_tis_function(**given)
        result = self._correction.call(**given)
        fits = (
            isinstance(result, tuple)
            and len(result) == 3
            and isinstance(result[0], torch.Tensor)
            and result[0].shape == per_token.shape
            and [len(mask) for mask in result[1]] == batch.response_lengths
            and isinstance(result[2], dict)
        )
        if not fits:
            wanted = "(pg_loss [sum R], masks [R_i] of each sample, dict of metrics [sum R])"
            raise _bad(self._correction, result, wanted)
        corrected: Correction = result
        return corrected

    def reducer(self, batch: MicroBatch, masks: list[torch.Tensor], *, per_token: bool) -> Reduce | None:
        """``--custom-pg-loss-reducer-function-path``: what makes a number of the policy loss per token; None: ours."""
        hook = self._reducer
        if hook is None:
            return None
        made = hook.call(batch.total_lengths, batch.response_lengths, masks, per_token)
        if not callable(made):
            raise _bad(hook, made, "a function of the loss per token")
        inner = Hook(hook.flag, hook.path, made)

        def reduce(values: torch.Tensor) -> torch.Tensor:
            result = inner.call(values)
            if not isinstance(result, torch.Tensor) or result.numel() != 1:
                raise _bad(hook, result, "a function that gives a 0-d tensor")
            return result.reshape(())

        return reduce

    def loss(
        self, batch: MicroBatch, logits: torch.Tensor, sum_of_sample_mean: Reduce
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``--custom-loss-function-path``: ``fn(args, batch, logits, sum_of_sample_mean)``.

        The batch is a dict. Logits are the model's, ``[1, T, V / tp]`` or, with ``--qkv-format bshd``,
        ``[B, P, V / tp]``; ``loss_hub.logit_processors`` makes log-probabilities of them, at the rollout's temperature.
        """
        hook = self._loss
        assert hook is not None, "the flags are checked"
        lengths = max_seq_lens(batch)
        shaped = logits.unsqueeze(0) if lengths is None else logits.view(len(lengths), lengths[0], -1)
        result = hook.call(self._args, as_dict(batch), shaped, sum_of_sample_mean)
        if not (
            isinstance(result, tuple)
            and len(result) == 2
            and isinstance(result[0], torch.Tensor)
            and isinstance(result[1], dict)
        ):
            raise _bad(hook, result, "(0-d tensor, dict of 0-d tensors)")
        loss, metrics = result
        return loss, {name: torch.as_tensor(value).detach() for name, value in metrics.items()}


def max_seq_lens(batch: MicroBatch) -> list[int] | None:
    """Length of each sample's row in a padded batch; None in a packed one."""
    width = batch.layout.width if batch.layout is not None else None
    return None if width is None else [width] * len(batch.total_lengths)


def as_dict(batch: MicroBatch) -> dict[str, Any]:
    """As hooks see a batch."""
    bounds = batch.cu_seqlens.tolist()
    samples = [batch.tokens[a:b] for a, b in pairwise(bounds)]
    return {
        **batch.columns,
        "tokens": batch.tokens.unsqueeze(0),
        "unconcat_tokens": samples[: len(batch.total_lengths)],
        "total_lengths": batch.total_lengths,
        "response_lengths": batch.response_lengths,
        "loss_masks": batch.loss_masks,
        "max_seq_lens": max_seq_lens(batch),
    }


def _bad(hook: Hook, result: Any, wanted: str) -> BadLossFunction:
    return BadLossFunction(
        f"{hook.flag} {hook.path} returned something else than a loss",
        evidence=f"it returned {str(result)[:300]} ({type(result).__name__})",
        advice=f"Return {wanted}.",
    )
