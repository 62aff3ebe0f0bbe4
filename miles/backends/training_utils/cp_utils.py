"""What losses of users ask of context parallelism, for one rank per sample: then nothing is cut, gathered or moved.

Offsets count from the begin of a sample's prompt. With ``--context-parallel-size`` above 1 all of these raise: losses
and corrections get whole responses there, on every rank, and only logits are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

from miles.backends.training_utils.parallel import get_parallel_state
from miles_agents.errors import UserCodeError

Range = tuple[int, int]
Values = TypeVar("Values", torch.Tensor, list[float])


class NotWithContextParallelism(UserCodeError):
    """A function for user code that is built for a context-parallel size of 1 only."""

    code = "E-TRAIN-014"


def get_logits_and_tokens_offset_with_cp(
    total_length: int, response_length: int, qkv_format: str = "thd", max_seq_len: int | None = None
) -> tuple[int, tuple[Range, Range], tuple[Range, Range], tuple[Range, Range]]:
    """Size of a chunk (half of the sample, or of its padded row, rounded up); the two chunks; rows of the logits in
    each that predict a token of the response; and these tokens. An empty range is (0, 0).

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("get_logits_and_tokens_offset_with_cp")
    length = total_length if qkv_format == "thd" or max_seq_len is None else max_seq_len
    size = -(-length // 2)
    chunks = ((0, size), (size, 2 * size))
    first, last = total_length - response_length - 1, total_length - 1
    rows = [(max(start, first), min(end, last)) for start, end in chunks]
    logits = [(start, end) if start < end else (0, 0) for start, end in rows]
    tokens = [(start + 1, end + 1) if start < end else (0, 0) for start, end in rows]
    return size, chunks, (logits[0], logits[1]), (tokens[0], tokens[1])


def get_sum_of_sample_mean(  # noqa: PLR0917  # user code calls it by position
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[torch.Tensor],
    calculate_per_token_loss: bool = False,
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of values ``[sum R_i]``: ``sum_i sum(x_i m_i) / max(sum m_i, 1)``, or, per token, ``sum(x m)``.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("get_sum_of_sample_mean")
    lengths = list(response_lengths)
    weights = [mask if calculate_per_token_loss else mask / mask.sum().clamp(min=1) for mask in loss_masks]

    def reduce(values: torch.Tensor) -> torch.Tensor:
        parts = zip(torch.split(values, lengths), weights, strict=True)
        return torch.stack([(part * weight).sum() for part, weight in parts]).sum()

    return reduce


def get_local_response_loss_masks(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: list[torch.Tensor],
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """The masks that belong to this rank's log-probabilities: all of them.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("get_local_response_loss_masks")
    return loss_masks


def slice_loss_masks_for_local_cp(
    loss_masks: list[torch.Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """``get_local_response_loss_masks`` with another order of arguments."""
    return get_local_response_loss_masks(total_lengths, response_lengths, loss_masks, qkv_format, max_seq_lens)


def all_gather_with_cp(
    tensor: torch.Tensor,
    total_length: int,
    response_length: int,
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
) -> torch.Tensor:
    """``[R, ...]`` from what each rank has of a response: the tensor itself.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("all_gather_with_cp")
    return tensor


def slice_with_cp(
    tokens: torch.Tensor,
    pad_value: float | Callable[[torch.Tensor, int], torch.Tensor],
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
    parallel_state: Any = None,
) -> torch.Tensor:
    """This rank's part of a sample's values ``[T, ...]``: all of them; in a padded batch filled up to ``max_seq_len``
    with ``pad_value``, or by it if it is a function ``(values, how many)``.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("slice_with_cp", parallel_state)
    if qkv_format != "bshd" or max_seq_len is None:
        return tokens
    missing = max_seq_len - len(tokens)
    if callable(pad_value):
        return pad_value(tokens, missing)
    return F.pad(tokens, (0, 0) * (tokens.dim() - 1) + (0, missing), value=pad_value)


def slice_log_prob_with_cp(
    log_prob: Values,
    total_length: int,
    response_length: int,
    qkv_format: str = "thd",
    max_token_len: int | None = None,
) -> Values:
    """This rank's part of a response's values ``[R]``: all of them.

    Raises:
        NotWithContextParallelism: The size is above 1.
    """
    _only_one_rank("slice_log_prob_with_cp")
    return log_prob


def _only_one_rank(function: str, state: Any = None) -> None:
    size = (get_parallel_state() if state is None else state).cp_size
    if size != 1:
        raise NotWithContextParallelism(
            f"{function} is not built for context parallelism",
            evidence=f"--context-parallel-size is {size}",
            advice="Losses and corrections get whole responses on every rank: do without it, or use "
            "--context-parallel-size 1.",
        )
