"""From the logits of a micro-batch to what belongs to its responses, for losses of users. Without context parallelism.

Logits are ``[1, T, V / tp]`` of packed samples, or ``[B, P, V / tp]`` of padded ones, as the model gives them: the
rollout's temperature is applied here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from miles.backends.training_utils.cp_utils import NotWithContextParallelism
from miles.backends.training_utils.data import pieces
from miles.backends.training_utils.loss_hub.math_utils import log_probs_and_entropy
from miles.backends.training_utils.parallel import get_parallel_state

Tensors = Sequence[torch.Tensor]
Lengths = Sequence[int]


def get_responses(
    logits: torch.Tensor,
    *,
    args: Any,
    unconcat_tokens: Tensors,
    total_lengths: Lengths,
    response_lengths: Lengths,
    max_seq_lens: Lengths | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each sample the logits ``[R, V / tp]`` that predict its response, divided by the temperature (values of a
    critic, ``[R, 1]``, are not), and the response's tokens ``[R]``.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _need_whole_rows("get_responses")
    flat = logits.flatten(0, 1)
    scale = _temperature(args) if flat.shape[-1] > 1 else 1.0
    rows = _rows(total_lengths, response_lengths, max_seq_lens)
    for (start, end), tokens, response in zip(rows, unconcat_tokens, response_lengths, strict=False):
        chosen = flat[start:end]
        yield chosen / scale if scale != 1.0 else chosen, tokens[len(tokens) - response :]


def get_log_probs_and_entropy(
    logits: torch.Tensor,
    *,
    args: Any,
    unconcat_tokens: Tensors,
    total_lengths: Lengths,
    response_lengths: Lengths,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    non_loss_data: bool = True,
    max_seq_lens: Lengths | None = None,
) -> dict[str, list[torch.Tensor]]:
    """``log_probs``, and ``entropy`` if asked for: float32 ``[R_i]`` of each sample, with gradient, right under tensor
    parallelism. ``non_loss_data`` changes nothing.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _need_whole_rows("get_log_probs_and_entropy")
    spans = _rows(total_lengths, response_lengths, max_seq_lens)
    rows = [torch.arange(start, end, device=logits.device) for start, end in spans]
    targets = [t[len(t) - r :] for t, r in zip(unconcat_tokens, response_lengths, strict=True)]
    values, entropy = log_probs_and_entropy(
        logits.flatten(0, 1),
        torch.cat(rows),
        torch.cat(targets).to(logits.device, torch.int64),
        temperature=_temperature(args),
        vocab_size=(getattr(args, "hf_config", None) or {}).get("vocab_size"),
        tp_group=get_parallel_state().tp_group,
        chunk_size=int(getattr(args, "log_probs_chunk_size", None) or -1),
        with_entropy=with_entropy,
    )
    found = {"log_probs": pieces(values, response_lengths)}
    if entropy is not None:
        found["entropy"] = pieces(entropy if entropy_requires_grad else entropy.detach(), response_lengths)
    return found


def get_values(
    logits: torch.Tensor,
    *,
    args: Any,
    unconcat_tokens: Tensors,
    total_lengths: Lengths,
    response_lengths: Lengths,
    with_entropy: bool = False,
    non_loss_data: bool = True,
    max_seq_lens: Lengths | None = None,
) -> dict[str, list[torch.Tensor]]:
    """``values``: float32 ``[R_i]`` of each sample, from a critic's output ``[1, T, 1]``. ``with_entropy`` and
    ``non_loss_data`` change nothing.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    parts = get_responses(
        logits,
        args=args,
        unconcat_tokens=unconcat_tokens,
        total_lengths=total_lengths,
        response_lengths=response_lengths,
        max_seq_lens=max_seq_lens,
    )
    return {"values": [values.squeeze(-1).float() for values, _ in parts]}


def _rows(total_lengths: Lengths, response_lengths: Lengths, max_seq_lens: Lengths | None) -> list[tuple[int, int]]:
    """Of each sample, which rows predict its response: of one at ``[start, end)`` those from ``start - 1``."""
    found, begin = [], 0
    for number, (total, response) in enumerate(zip(total_lengths, response_lengths, strict=True)):
        end = begin + total
        found.append((end - response - 1, end - 1))
        begin += total if max_seq_lens is None else max_seq_lens[number]
    return found


def _temperature(args: Any) -> float:
    value = getattr(args, "rollout_temperature", None)
    return 1.0 if not value or value < 0 else float(value)


def _need_whole_rows(function: str) -> None:
    size = get_parallel_state().cp_size
    if size != 1:
        raise NotWithContextParallelism(
            f"{function} is not built for context parallelism",
            evidence=f"--context-parallel-size is {size}: this rank has the logits of some tokens only",
            advice="Use --context-parallel-size 1 with --loss-type custom_loss.",
        )
