"""Low-rank adapters beside the linear layers of a Megatron model, cut as these are.

A layer that joins several of Hugging Face's (``linear_qkv``, ``linear_fc1``) has one adapter: ``b`` has the rows of the
layer's weight, in its order, and ``a`` one block of ``rank`` rows for each matrix that the joined layers do not share.
Of a column-parallel layer ``b`` is cut and ``a`` is on all tensor-parallel ranks; of a row-parallel one it is the other
way round. Only adapters are trained. Invariant: ranks that hold the same part of one hold the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from miles.backends.base import ParallelState
from miles.backends.lora.files import Below, Pair, write_adapter
from miles.backends.lora.values import FirstValues, Switch, bit_sum, merged
from miles.backends.megatron_utils.errors import UnsupportedSetting
from miles.backends.megatron_utils.families import Rule
from miles.backends.megatron_utils.gather import all_shards, from_owner
from miles.backends.megatron_utils.stages import Stage
from miles.backends.megatron_utils.weight_layouts import GateAndUp
from miles.backends.megatron_utils.weights import tensor_parallel
from miles.utils.lora import LoraSettings

WEIGHT = ".weight"


@dataclass(frozen=True)
class Plan:
    """What one Megatron layer's adapter is made of.

    Attributes:
        rule: Of its weight.
        modules: Hugging Face's layers that it joins, by full name.
        blocks: Of each, which block of ``a`` it uses; None: it has no adapter.
    """

    rule: Rule
    modules: tuple[str, ...]
    blocks: tuple[int | None, ...]

    @classmethod
    def of(cls, rule: Rule, settings: LoraSettings) -> Plan | None:
        """None: nothing here has an adapter."""
        modules = tuple(name.removesuffix(WEIGHT) for name in rule.hf)
        if not rule.megatron.endswith(WEIGHT) or not any(settings.has(module) for module in modules):
            return None
        sharers = [settings.sharer(module) if settings.has(module) else None for module in modules]
        order = list(dict.fromkeys(sharer for sharer in sharers if sharer is not None))
        return cls(rule, modules, tuple(None if sharer is None else order.index(sharer) for sharer in sharers))

    @property
    def count(self) -> int:
        """Blocks of ``a``."""
        return len({block for block in self.blocks if block is not None})

    def widths(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of each of Hugging Face's layers with an adapter."""
        shapes = zip(self.modules, self.blocks, self.rule.hf.values(), strict=True)
        return {module: (rows, columns) for module, block, (rows, columns) in shapes if block is not None}


class Adapter(torch.nn.Module):
    """Of one layer, on this rank. ``a`` ``[count * rank, in]``, ``b`` ``[out, rank]``, each or the other cut."""

    def __init__(self, base: Any, plan: Plan, settings: LoraSettings, rank: int, size: int) -> None:
        super().__init__()
        self.plan, self.dropout, self.scaling = plan, settings.dropout, settings.scaling
        self.is_column = isinstance(base, ColumnParallelLinear)
        self.is_expert = plan.rule.expert is not None
        self.sequence_parallel = bool(base.config.sequence_parallel) and not self.is_expert
        self.size = 1 if self.is_expert else size
        rows, columns = base.weight.shape
        self.a = torch.nn.Parameter(base.weight.new_empty(plan.count * settings.rank, columns))
        self.b = torch.nn.Parameter(base.weight.new_empty(rows, settings.rank))
        self._mark(base.weight)
        self.mask: torch.Tensor | None
        self.register_buffer("mask", self._mask(settings.rank, rank, size), persistent=False)

    def _mark(self, weight: Any) -> None:
        """As megatron.core asks: what is cut, what is reduced over which ranks."""
        for parameter, is_cut, dim in ((self.a, not self.is_column, 1), (self.b, self.is_column, 0)):
            if self.is_expert:  # whole, as the weight is
                set_tensor_model_parallel_attributes(parameter, weight.tensor_model_parallel, dim, 1)
                for mark in ("allreduce", "sequence_parallel"):
                    setattr(parameter, mark, getattr(weight, mark, mark == "allreduce"))
                continue
            set_tensor_model_parallel_attributes(parameter, is_cut, dim, 1)
            # Each tensor-parallel rank sees some rows only: their gradients are added up.
            parameter.sequence_parallel = self.sequence_parallel and not is_cut  # type: ignore[attr-defined]

    def _mask(self, rank_of_adapter: int, rank: int, size: int) -> torch.Tensor | None:
        """``[out, count * rank]`` of 0 and 1: which blocks of ``a`` each row of ``b`` works on. None: all of one."""
        plan = self.plan
        if plan.count == 1 and None not in plan.blocks:
            return None
        numbers = [-1 if block is None else block for block in plan.blocks]
        whole = [
            torch.full((shape[0], 1), number) for shape, number in zip(plan.rule.hf.values(), numbers, strict=True)
        ]
        own = plan.rule.layout.shard(whole, rank, size)
        chosen = own == torch.arange(plan.count)
        return chosen.repeat_interleave(rank_of_adapter, 1).to(self.b.device, self.b.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output, in its layout over ranks."""
        hidden = F.linear(self._dropped(x), self.a)
        if self.size > 1 and self.is_column:
            # Each rank has the gradient of its own columns: on the way back they are added up.
            if self.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden)
        elif self.size > 1:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            hidden = reduce(hidden)
        return F.linear(hidden, self._widened()) * self.scaling

    def _widened(self) -> torch.Tensor:
        """``b`` ``[out, count * rank]``, for all blocks of ``a`` at once."""
        if self.mask is None:
            return self.b
        widened: torch.Tensor = self.b.repeat(1, self.plan.count) * self.mask
        return widened

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dropout or not self.training:
            return x
        # Ranks with the same rows drop the same of them; others have generators of their own.
        is_whole = self.size == 1 or (self.is_column and not self.sequence_parallel)
        with contextlib.nullcontext() if is_whole else get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    @torch.no_grad()
    def fill(self, values: FirstValues, rank: int, size: int) -> None:
        """This rank's part of whole pairs."""
        plan = self.plan
        pairs = [
            None if block is None else values.pair(module)
            for module, block in zip(plan.modules, plan.blocks, strict=True)
        ]
        blocks: dict[int, torch.Tensor] = {}
        halves = []
        for block, pair, shape in zip(plan.blocks, pairs, plan.rule.hf.values(), strict=True):
            if block is not None and pair is not None:
                blocks.setdefault(block, pair[0])
            halves.append(torch.zeros(shape[0], self.b.shape[1]) if pair is None else pair[1])
        a = torch.cat([blocks[number] for number in sorted(blocks)])
        if self.is_column:
            self.a.copy_(a)
            self.b.copy_(plan.rule.layout.shard(halves, rank, size))
        else:
            self.a.copy_(a.chunk(size, 1)[rank])
            self.b.copy_(halves[0])

    def pairs(self, group: dist.ProcessGroup | None) -> list[Pair | None]:
        """Whole, of each joined layer; collective over the tensor-parallel group."""
        rule = self.plan.rule
        a, b = self.a.detach(), self.b.detach()
        if self.is_column:
            halves = rule.layout.merge(all_shards([b], group)[0])
        else:
            parts = all_shards([a], group)[0]
            a, halves = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), [b]
        blocks = a.chunk(self.plan.count)
        return [
            None if block is None else (blocks[block], half)
            for block, half in zip(self.plan.blocks, halves, strict=True)
        ]

    def sharded(self, key: str, parallel: ParallelState) -> dict[str, Any]:
        """For checkpoints, under global names."""
        copies = (0, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        if self.is_expert:
            copies = (0, 0, parallel_state.get_expert_data_parallel_rank())
        uncut = (0, copies[1] if self.is_expert else parallel.tp_rank, copies[2])
        cut_size = 1 if self.is_expert else parallel.tp_size
        found = {}
        for name, parameter, is_cut, dim in (("a", self.a, not self.is_column, 1), ("b", self.b, self.is_column, 0)):
            offsets = [(dim, parallel.tp_rank, cut_size)] if is_cut and cut_size > 1 else []
            tensor = ShardedTensor.from_rank_offsets(
                f"{key}.{name}", parameter, *offsets, replica_id=copies if offsets or self.is_expert else uncut
            )
            if name == "b" and isinstance(self.plan.rule.layout, GateAndUp) and offsets:
                tensor = apply_swiglu_sharded_factory(tensor, ())
            found[name] = tensor
        return found


class Adapters:
    """Of a whole model: this rank's, and what all ranks do together. See the module's docstring.

    Its ``sharded_state_dict`` and ``load_state_dict`` make it what a checkpoint holds in place of a model.

    Args:
        model: Filled with the weights below; they no longer get gradients.
        base: The path they come from.

    Raises:
        BadAdapter: ``--lora-adapter-path`` holds none that fits.
        UnsupportedSetting: A layer of the model is none of megatron.core's parallel linears.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rules: Sequence[Rule],
        settings: LoraSettings,
        *,
        stage: Stage,
        parallel: ParallelState,
        base: Path,
    ) -> None:
        self.settings, self.switch, self.base = settings, Switch(), base
        self._model, self._stage, self._parallel = model, stage, parallel
        # Layers that predict further tokens have none: they are trained beside the policy, or not at all.
        of_layers = [rule for rule in rules if rule.layer is not None]
        plans = {rule.megatron: plan for rule in of_layers if (plan := Plan.of(rule, settings)) is not None}
        self._plans = plans
        self.checksum = weights_checksum(model, rules, stage, parallel)
        self.below = Below(base, self.checksum)
        model.requires_grad_(False)
        values = FirstValues(
            settings, {name: width for plan in plans.values() for name, width in plan.widths().items()}
        )
        self._own: dict[str, Adapter] = {}
        for name, rule in stage.local_rules(rules):
            if rule.megatron in plans:
                self._own[rule.megatron] = self._attach(name, plans[rule.megatron], values)
        _give_gradients_a_way(model)

    def _attach(self, name: str, plan: Plan, values: FirstValues) -> Adapter:
        linear = self._model.get_submodule(name.removesuffix(WEIGHT))
        rank, size = tensor_parallel(plan.rule, self._parallel)
        if not isinstance(linear, ColumnParallelLinear | RowParallelLinear) or (
            plan.rule.expert is not None and size > 1
        ):
            raise UnsupportedSetting(
                f"--lora-rank {self.settings.rank}: {name.removesuffix(WEIGHT)} can have no adapter",
                evidence=f"it is a {type(linear).__name__}"
                + (f", an expert cut over {size} ranks" if size > 1 else ""),
                advice="Leave its layers out with --exclude-modules; experts need --expert-tensor-parallel-size 1.",
            )
        adapter = Adapter(linear, plan, self.settings, rank, size)
        adapter.fill(values, rank, size)
        linear.adapter = adapter
        switch = self.switch

        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> Any:
            return (output[0] + adapter(inputs[0]), *output[1:]) if switch.on else None

        linear.register_forward_hook(add)
        return adapter

    def merge(self, rule: Rule, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hugging Face's tensors of a parameter that this rank holds, with what adapters add to them."""
        adapter = self._own.get(rule.megatron)
        if adapter is None:
            return tensors
        pairs = zip(tensors, adapter.pairs(self._group(rule)), strict=True)
        return [tensor if pair is None else merged(tensor, pair, adapter.scaling) for tensor, pair in pairs]

    def _group(self, rule: Rule) -> dist.ProcessGroup | None:
        return self._parallel.tp_group if rule.expert is None else self._parallel.etp_group

    def whole(self) -> Iterator[tuple[str, Pair]]:
        """All pairs, by the full name of Hugging Face's layer, on every rank. Collective."""
        like, rank = next(self._model.parameters()), self.settings.rank
        stage, parallel = self._stage, self._parallel
        for megatron, plan in self._plans.items():
            own, rule = self._own.get(megatron), plan.rule
            found = dict(zip(plan.modules, own.pairs(self._group(rule)), strict=True)) if own is not None else {}
            owner, ep_owner = stage.stage_of(rule), stage.ep_rank_of(rule)
            for module, (rows, columns) in plan.widths().items():
                pair = list(found.get(module) or (like.new_empty(rank, columns), like.new_empty(rows, rank)))
                if ep_owner is not None and owner == stage.rank:
                    pair = from_owner(pair, ep_owner, parallel.ep_group)
                a, b = from_owner(pair, owner, parallel.pp_group)
                yield module, (a, b)

    def write(self, directory: Path) -> None:
        """In ``peft``'s layout; collective, rank 0 writes.

        Raises:
            OSError: On rank 0.
        """
        is_first = self._parallel.rank == 0
        kept = {}
        for module, (a, b) in self.whole():
            if is_first:
                kept[module] = (a.to("cpu", copy=True), b.to("cpu", copy=True))
        if is_first:
            write_adapter(directory, kept, self.settings, self.below)

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """This rank's, by the names of its parameters in the model."""
        found: dict[str, Any] = {}
        for name, rule in self._stage.local_rules([plan.rule for plan in self._plans.values()]):
            if rule.megatron in self._own and rule.layer is not None:
                local, key = (full.removesuffix(WEIGHT) + ".adapter" for full in (name, rule.megatron))
                parts = self._own[rule.megatron].sharded(key, self._parallel)
                found |= {f"{local}.{part}": tensor for part, tensor in parts.items()}
        return found

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """What was loaded into the tree of ``sharded_state_dict``."""
        unexpected = self._model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, unexpected


def _give_gradients_a_way(model: torch.nn.Module) -> None:
    """Recomputed layers get gradients only if their input has one, and nothing before the first layer is trained."""

    def ask(_: Any, __: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    embedding = getattr(model, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(ask)


def weights_checksum(model: torch.nn.Module, rules: Sequence[Rule], stage: Stage, parallel: ParallelState) -> int:
    """``bit_sum`` of all weights, each counted once, whatever ranks they are spread over."""
    parameters = dict(model.named_parameters())
    like = next(iter(parameters.values()))
    sums = torch.zeros(2, dtype=torch.int64, device=like.device)
    for rule in rules:
        name = stage.local_name(rule)
        if name is not None and (rule.layout.sharded or tensor_parallel(rule, parallel)[0] == 0):
            sums[int(rule.expert is not None)] += bit_sum(parameters[name])
    dense, experts = sums[:1], sums[1:]
    for tensor, group in (
        (dense, parallel.tp_group), (dense, parallel.pp_group),
        (experts, parallel.etp_group), (experts, parallel.ep_group), (experts, parallel.pp_group),
    ):  # fmt: skip
        if group is not None and group.size() > 1:
            dist.all_reduce(tensor, group=group)
    return int((dense + experts).item())
