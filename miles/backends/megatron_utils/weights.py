"""Weights between a Hugging Face directory, or full tensors of its names, and a model that is spread over ranks: cut
by tensor parallelism, its layers on pipeline stages, its experts on expert-parallel ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from miles.backends.base import ParallelState
from miles.backends.hf_directory import MTP_LAYERS, HFDirectory
from miles.backends.megatron_utils.errors import BadModelDirectory
from miles.backends.megatron_utils.families import Rule
from miles.backends.megatron_utils.gather import all_shards, from_owner
from miles.backends.megatron_utils.stages import Stage
from miles.backends.megatron_utils.value_head import NAME as VALUE_HEAD
from miles.backends.training_utils.collectives import bytes_at_once

IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Ends of names that a directory may hold without the model needing them: computed, or a copy of a tied embedding."""


def load_hf_weights(
    model: torch.nn.Module, rules: Sequence[Rule], directory: HFDirectory, *, stage: Stage, parallel: ParallelState
) -> None:
    """Fill the parameters of ``model`` from the directory. Files are mapped, and only this rank's part is read.

    Raises:
        BadModelDirectory: A tensor is missing, left over, or of another shape.
    """
    parameters = dict(model.named_parameters())
    own = stage.local_rules(rules)
    # A critic's value head is in no file of a language model.
    assert set(parameters) - {VALUE_HEAD} == {name for name, _ in own} - {VALUE_HEAD}, (
        "the table does not fit the model"
    )
    _compare_names(rules, directory)
    with torch.no_grad(), directory.opened() as opened:
        for name, rule in own:
            tensors = [opened.tensor(tensor) for tensor in rule.hf]
            _compare_shapes(rule, tensors, directory)
            rank, size = tensor_parallel(rule, parallel)
            parameters[name].copy_(rule.layout.shard(tensors, rank, size))


def tensor_parallel(rule: Rule, parallel: ParallelState) -> tuple[int, int]:
    """Experts are cut by a size of their own."""
    if rule.expert is None:
        return parallel.tp_rank, parallel.tp_size
    return parallel.etp_rank, parallel.etp_size


def _compare_shapes(rule: Rule, tensors: Sequence[torch.Tensor], directory: HFDirectory) -> None:
    for (name, expected), tensor in zip(rule.hf.items(), tensors, strict=True):
        if tuple(tensor.shape) != expected:
            raise BadModelDirectory(
                f"weights in {directory.path} have other shapes than its config.json says",
                evidence=f"{name} is {tuple(tensor.shape)}, and should be {expected}",
                advice="Use the config.json that belongs to the weights.",
                path=str(directory.path),
            )


def _compare_names(rules: Sequence[Rule], directory: HFDirectory) -> None:
    expected = {name for rule in rules for name in rule.hf}
    missing = sorted(expected - directory.names)
    # Layers for further tokens may be left out, all of them.
    left_out = () if any(name.startswith(MTP_LAYERS) for name in expected) else (MTP_LAYERS,)
    others = (name for name in directory.names - expected if not name.startswith(left_out))
    extra = sorted(name for name in others if not name.endswith(IGNORED))
    if missing or extra:
        raise BadModelDirectory(
            f"{directory.path} does not hold the weights that its config.json describes",
            evidence=f"missing: {_some(missing)}; left over: {_some(extra)}",
            advice="Use a complete directory of the model, with the config.json that belongs to it.",
            path=str(directory.path),
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


Merge = Callable[[Rule, list[torch.Tensor]], list[torch.Tensor]]


def full_tensors(
    model: torch.nn.Module,
    rules: Sequence[Rule],
    *,
    stage: Stage,
    parallel: ParallelState,
    merge: Merge | None = None,
    at_once: int | None = None,
    only_first: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors; collective over tensor-, expert- and pipeline-parallel groups.

    A tensor may share memory with the model, and with no other that comes later. The ranks that hold a parameter put it
    together, and send it to those that do not: first to the other expert-parallel ranks of their stage, then to the
    other stages. ``merge`` is what they do with it before that.

    Args:
        at_once: Bytes of full tensors that are put together at a time, but for a single parameter that is larger; by
            default what suits the device.
        only_first: Rank 0 has them, others yield nothing. With ``merge``, which may be collective, all have them.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = _Whole(parameters, stage, parallel, merge, only_first=only_first and merge is None)
    limit = (at_once or bytes_at_once(whole.like.device)) // whole.like.itemsize
    for batch in _batches(rules, limit):
        yield from whole.tensors(batch)


def _batches(rules: Sequence[Rule], limit: int) -> Iterator[list[Rule]]:
    """Parameters of ``limit`` numbers or fewer. By what all ranks know, as all have to make the same batches."""
    batch: list[Rule] = []
    total = 0
    for rule in rules:
        size = sum(math.prod(shape) for shape in rule.hf.values())
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(rule)
        total += size
    yield batch


class _Whole:
    """Puts parameters together, a batch at a time. Every rank does the same steps of the same batches in this order, so
    that no two wait for each other in different groups."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        stage: Stage,
        parallel: ParallelState,
        merge: Merge | None,
        *,
        only_first: bool,
    ) -> None:
        self.like = next(iter(parameters.values()))
        self._parameters = parameters
        self._stage = stage
        self._parallel = parallel
        self._merge = merge
        self._only_first = only_first

    def tensors(self, batch: Sequence[Rule]) -> Iterator[tuple[str, torch.Tensor]]:
        """Of all its parameters, on every rank. What no other rank waits for is merged when it is asked for."""
        shards = self._shards(batch)
        sent = self._sent(batch, shards)
        if self._only_first and self._parallel.rank != 0:
            return
        for rule in batch:
            name = rule.megatron
            found = sent.pop(name) if name in sent else self._merged(rule, shards.pop(name))
            yield from zip(rule.hf, found, strict=True)

    def _shards(self, batch: Sequence[Rule]) -> dict[str, list[torch.Tensor]]:
        """By tensor-parallel rank, of each parameter that this rank has a part of."""
        found, parallel = {}, self._parallel
        dense: list[str] = []
        experts: list[str] = []
        for rule in batch:
            name = self._stage.local_name(rule)
            if name is None:
                continue
            found[rule.megatron] = [self._parameters[name]]
            if rule.layout.sharded:
                (dense if rule.expert is None else experts).append(rule.megatron)
        for names, group in ((dense, parallel.tp_group), (experts, parallel.etp_group)):
            gathered = all_shards([found[name][0] for name in names], group, only_first=self._only_first)
            found |= dict(zip(names, gathered, strict=True))
        return found

    def _merged(self, rule: Rule, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tensors = list(rule.layout.merge(shards))
        return tensors if self._merge is None else self._merge(rule, tensors)

    def _sent(self, batch: Sequence[Rule], shards: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Those that some rank lacks, of their owners, by parameter. Takes their shards away."""
        ep_owners = {rule.megatron: self._stage.ep_rank_of(rule) or 0 for rule in batch if self._crosses_experts(rule)}
        owners = {rule.megatron: self._stage.stage_of(rule) for rule in batch if self._crosses_stages(rule)}
        sent = {}
        for rule in batch:
            name = rule.megatron
            if name in ep_owners or name in owners:
                sent[name] = self._merged(rule, shards.pop(name)) if name in shards else self._to_come(rule)
        _send(sent, ep_owners, self._parallel.ep_group)
        _send(sent, owners, self._parallel.pp_group)
        return sent

    def _crosses_experts(self, rule: Rule) -> bool:
        """Whether this rank takes part in sending it from an expert-parallel rank to the others of the stage."""
        owner = self._stage.ep_rank_of(rule)
        if owner is None or self._stage.stage_of(rule) != self._stage.rank or not _is_shared(self._parallel.ep_group):
            return False
        return not self._only_first or (owner != 0 and self._leads(rule))

    def _crosses_stages(self, rule: Rule) -> bool:
        """Whether this rank takes part in sending it from a stage to the others."""
        if not _is_shared(self._parallel.pp_group):
            return False
        is_there = rule.expert is None or self._parallel.ep_rank == 0
        return not self._only_first or (self._stage.stage_of(rule) != 0 and self._leads(rule) and is_there)

    def _leads(self, rule: Rule) -> bool:
        """Whether it is put together here, of those that it is cut over."""
        return tensor_parallel(rule, self._parallel)[0] == 0

    def _to_come(self, rule: Rule) -> list[torch.Tensor]:
        """Shapes without memory."""
        return [self.like.new_empty(()).expand(shape) for shape in rule.hf.values()]


def _is_shared(group: dist.ProcessGroup | None) -> bool:
    return group is not None and group.size() > 1


def _send(tensors: dict[str, list[torch.Tensor]], owners: Mapping[str, int], group: dist.ProcessGroup | None) -> None:
    """Each from its owner to the rest of the group, in one broadcast per owner."""
    if not _is_shared(group):
        return
    for owner in sorted(set(owners.values())):
        names = [name for name, its in owners.items() if its == owner]
        arrived = iter(from_owner([tensor for name in names for tensor in tensors[name]], owner, group))
        for name in names:
            tensors[name] = list(itertools.islice(arrived, len(tensors[name])))
