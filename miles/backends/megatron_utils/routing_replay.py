"""Routers of megatron.core whose choice is recorded, or comes from a recording (``training_utils.routing``).

``TopKRouter`` asks the object that it has as ``router_replay`` for scores and numbers of the chosen experts, not
``torch.topk``. megatron.core's own such object keeps one recording for all models of the process and one micro-batch;
this one knows the samples of each micro-batch, the rows of this rank, and which pass of the model is running.

A call from within a forward pass is for that micro-batch. Any other comes from the backward pass, where layers are
computed again (``--recompute-granularity``): each layer does so once per micro-batch, in the order in which the forward
passes were, whatever the pipeline's schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from miles.backends.base import MicroBatch, ParallelState
from miles.backends.megatron_utils.errors import UnsupportedSetting
from miles.backends.megatron_utils.families import Experts
from miles.backends.training_utils.routing import BadRoutedExperts
from miles.backends.training_utils.sequence_layout import SequenceLayout

Chosen: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Scores and int64 numbers of the chosen experts, ``[rows, k]`` each."""


@dataclass
class _Pass:
    """A forward pass of one micro-batch. ``targets``: int64 ``[rows, own layers, k]``, None: record."""

    targets: torch.Tensor | None = None
    seen: dict[int, torch.Tensor] = field(default_factory=dict)


class LayerReplay:
    """Of one router. megatron.core calls the method."""

    def __init__(self, replay: RoutingReplay, place: int) -> None:
        self._replay, self._place = replay, place

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Chosen] = torch.topk,
    ) -> Chosen:
        """Of ``scores`` ``[rows, experts]``."""

        def choose() -> Chosen:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        return self._replay.choose(self._place, scores, choose)


class RoutingReplay:
    """Of one model on this rank.

    Args:
        model: Its routers are given their parts of this.
        experts: As ``config.json`` says.
        parallel: Sequence-parallel ranks (tensor parallel, in a model with experts) have a part of the rows each.
        layers: The layers of this rank's pipeline stage.
        again: Layers are computed again in the backward pass.

    Raises:
        UnsupportedSetting: The model's routers are not megatron.core's.
    """

    def __init__(
        self, model: torch.nn.Module, experts: Experts, parallel: ParallelState, *, layers: range, again: bool
    ) -> None:
        self.experts, self.parallel = experts, parallel
        self.layers = [layer for layer in experts.layers if layer in layers]
        routers = {
            router.layer_number - 1: router
            for name, router in model.named_modules()
            if isinstance(router, TopKRouter) and ".mtp." not in f".{name}"
        }
        if sorted(routers) != self.layers:
            raise UnsupportedSetting(
                "the routing of this model cannot be replayed",
                evidence=f"megatron-core's routers are in layers {sorted(routers)}, experts in {self.layers}",
                advice="Leave --use-routing-replay and --use-rollout-routing-replay out with a model of your own.",
            )
        for place, layer in enumerate(self.layers):
            routers[layer].router_replay = LayerReplay(self, place)
        self._pass: _Pass | None = None
        self._again: list[deque[torch.Tensor]] | None = [deque() for _ in self.layers] if again else None
        self._keeps = False

    @contextmanager
    def forward(self, batch: MicroBatch, layout: SequenceLayout, *, training: bool) -> Iterator[None]:
        """Around a forward pass of the model. Collective among tensor-parallel ranks where it records.

        Raises:
            BadRoutedExperts: What is to be replayed does not fit the sample or the model.
        """
        routing = batch.routing
        if routing is None or not self.layers:
            yield
            return
        rows = self._rows(layout)
        running = _Pass() if routing.records else _Pass(self._targets(batch, rows))
        self._pass, self._keeps = running, training
        try:
            yield
        finally:
            self._pass = None
        if routing.records:
            self._keep(batch, rows, running)

    def end_step(self) -> None:
        """No backward pass is to come."""
        for queue in self._again or ():
            queue.clear()

    def choose(self, place: int, scores: torch.Tensor, choose: Callable[[], Chosen]) -> Chosen:
        """What the router in ``place`` among this rank's goes on with."""
        running = self._pass
        if running is not None and running.targets is None:
            found = choose()
            running.seen[place] = found[1].detach()
            return found
        if running is not None and running.targets is not None:
            experts = running.targets[:, place]
            if self._again is not None and self._keeps:
                self._again[place].append(experts)
        elif self._again is not None and self._again[place]:
            experts = self._again[place].popleft()
        else:
            return choose()
        unknown = experts[:, :1] < 0
        if unknown.any():
            experts = torch.where(unknown, choose()[1], experts)
        return scores.gather(1, experts), experts

    def _rows(self, layout: SequenceLayout) -> torch.Tensor:
        """int64 ``[rows]``: which of the packed tokens each row of this rank's routers is; -1 for padding."""
        index = layout.token_index
        if layout.width is not None:
            index = index.view(-1, layout.width).t().flatten()  # megatron.core has positions first, then samples
        size = len(index) // self.parallel.tp_size
        return index[self.parallel.tp_rank * size :][:size]

    def _targets(self, batch: MicroBatch, rows: torch.Tensor) -> torch.Tensor:
        assert batch.routing is not None
        k = self.experts.per_token
        parts = [
            self._checked(sample, batch.routing.experts(sample, length, self.layers))
            for sample, length in zip(batch.sample_positions, batch.total_lengths, strict=False)
        ]
        if not parts:  # a micro-batch without samples is one token
            return torch.full((len(rows), len(self.layers), k), -1, device=batch.tokens.device)
        packed = torch.cat(parts).to(torch.int64)
        return torch.where((rows >= 0)[:, None, None], packed[rows.clamp(min=0)], -1).to(batch.tokens.device)

    def _checked(self, sample: int, experts: torch.Tensor) -> torch.Tensor:
        """Rows are k different experts, or all -1."""
        ordered = experts.sort(-1).values
        same = (ordered[..., 1:] == ordered[..., :-1]).any(-1) & (ordered[..., -1] >= 0)
        half = (ordered[..., 0] < 0) & (ordered[..., -1] >= 0)
        wrong = same | half | (ordered[..., 0] < -1) | (ordered[..., -1] >= self.experts.count)
        if experts.shape[-1] == self.experts.per_token and not wrong.any():
            return experts
        shown = experts[wrong][0].tolist() if wrong.any() else f"{experts.shape[-1]} of them"
        raise BadRoutedExperts(
            f"sample {sample} names experts that the model cannot use",
            evidence=f"for one token: {shown}; the model has {self.experts.count}, {self.experts.per_token} per token",
            advice="Use data that was recorded with a model of this shape.",
            sample=sample,
        )

    def _keep(self, batch: MicroBatch, rows: torch.Tensor, running: _Pass) -> None:
        assert batch.routing is not None
        shape = (sum(batch.total_lengths), len(self.layers), self.experts.per_token)
        packed = torch.full(shape, -1, dtype=torch.int32, device=batch.tokens.device)
        real = (rows >= 0).to(batch.tokens.device)
        seen = torch.stack([running.seen[place] for place in range(len(self.layers))], 1)
        packed[rows.to(batch.tokens.device)[real]] = seen[real].int()
        if self.parallel.tp_size > 1:
            # In another pass a sample lies elsewhere in its micro-batch, and so with other ranks.
            dist.all_reduce(packed, dist.ReduceOp.MAX, group=self.parallel.tp_group)
        kept = packed.to(torch.int16 if self.experts.count < 2**15 else torch.int32).cpu()
        batch.routing.recorded |= zip(batch.sample_positions, torch.split(kept, batch.total_lengths), strict=False)


def make_replay(
    args: Any, model: Any, experts: Experts | None, parallel: ParallelState, layers: range
) -> RoutingReplay | None:
    """Of the model that is trained, if the flags ask for it; None: nothing is recorded or replayed."""
    if not getattr(args, "use_routing_replay", False) and not getattr(args, "use_rollout_routing_replay", False):
        return None
    if experts is None:
        raise UnsupportedSetting(
            "there is no routing to replay",
            evidence="the model has no experts",
            advice="Leave --use-routing-replay and --use-rollout-routing-replay out.",
        )
    again = getattr(args, "recompute_granularity", None) is not None
    return RoutingReplay(model, experts, parallel, layers=layers, again=again)
