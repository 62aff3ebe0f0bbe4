"""Attention that stays within each sample of a packed micro-batch, as an attention function of transformers.

Samples of about the same length are laid side by side in rows of the longest, and go through one causal attention
call: with padding at the end of a row, no token attends to padding, so that no mask is needed. Memory is linear in
tokens, and the number of calls grows with the spread of lengths, not with the number of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

WASTE = 0.25
"""The most padding in a row of a group, as a part of the row."""
SDPA = "miles_packed_sdpa"
EAGER = "miles_packed_eager"


@dataclass(frozen=True)
class Group:
    """``n`` samples in rows of ``L`` tokens.

    Attributes:
        gather: int64 ``[n * L]``: place in the packed row of each token; 0 where there is padding.
        keep: int64: places in the rows that hold a token.
    """

    rows: int
    length: int
    gather: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Where the samples of a packed row of ``tokens`` tokens lie.

    Attributes:
        groups: Together they hold each token of each sample once.
        order: int64 ``[tokens]``: for each place of the packed row, its place in the groups' outputs, one after the
            other; padding at the end of the row points behind them.
    """

    groups: tuple[Group, ...]
    order: torch.Tensor
    tokens: int


def packed_layout(bounds: Sequence[int], tokens: int, device: torch.device) -> PackedLayout:
    """Of samples that begin and end at ``bounds`` (``cu_seqlens``) in a row of ``tokens`` tokens."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    groups, order, done = [], torch.full((tokens,), bounds[-1], dtype=torch.int64), 0
    for members in _alike(lengths):
        rows, length = len(members), lengths[members[0]]
        starts = torch.tensor([bounds[i] for i in members])[:, None]
        sizes = torch.tensor([lengths[i] for i in members])[:, None]
        column = torch.arange(length)[None, :]
        is_token = column < sizes
        gather = torch.where(is_token, starts + column, 0).flatten()
        keep = is_token.flatten().nonzero()[:, 0]
        order[gather[keep]] = torch.arange(done, done + len(keep))
        done += len(keep)
        groups.append(Group(rows, length, gather.to(device), keep.to(device)))
    return PackedLayout(tuple(groups), order.to(device), tokens)


def register() -> None:
    """Tell transformers of these functions. It makes no masks for names that it has no mask function for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SDPA, _attend_sdpa)
    ALL_ATTENTION_FUNCTIONS.register(EAGER, _attend_eager)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Samples in groups, the longest of a group first; in an order that depends on lengths and places only."""
    groups: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not lengths[sample]:
            continue
        if groups and lengths[sample] >= (1 - WASTE) * lengths[groups[-1][0]]:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def _attend_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query ``[1, H, T, D]``, key and value ``[1, H_kv, T, D]``; the output is ``[1, T, H, D]``."""

    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    return _by_group(core, query, key, value, packed), None


def _attend_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As ``_attend_sdpa``, written out: scores of each pair of tokens, softmax in float32."""

    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(later, -torch.inf)
        weights = functional.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout)
        return weights @ v

    return _by_group(core, query, key, value, packed), None


def _by_group(core: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedLayout) -> Any:
    outputs = []
    for group in packed.groups:
        q, k, v = (_rows(tensor, group) for tensor in (query, key, value))
        flat = core(q, k, v).transpose(1, 2).reshape(group.rows * group.length, *_heads(query))
        outputs.append(flat if len(group.keep) == len(flat) else flat.index_select(0, group.keep))
    joined = torch.cat(outputs)
    if len(joined) < packed.tokens:
        joined = torch.cat([joined, joined.new_zeros(1, *joined.shape[1:])])
    return joined.index_select(0, packed.order).unsqueeze(0)


def _rows(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``[1, H, T, D]`` to ``[n, H, L, D]``."""
    _, heads, _, width = tensor.shape
    return tensor[0].index_select(1, group.gather).view(heads, group.rows, group.length, width).transpose(0, 1)


def _heads(query: torch.Tensor) -> tuple[int, int]:
    return query.shape[1], query.shape[3]
