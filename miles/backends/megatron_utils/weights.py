"""Weights between a Hugging Face directory, or full tensors of its names, and a model that is spread over ranks: cut
by tensor parallelism, its layers on pipeline stages, its experts on expert-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from miles.backends.base import ParallelState
from miles.backends.hf_directory import MTP_LAYERS, HFDirectory
from miles.backends.megatron_utils.errors import BadModelDirectory
from miles.backends.megatron_utils.families import Rule
from miles.backends.megatron_utils.stages import Stage
from miles.backends.megatron_utils.value_head import NAME as VALUE_HEAD

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
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors; collective over tensor-, expert- and pipeline-parallel groups.

    A tensor may share memory with the model, and with no other that comes later. The ranks that hold a parameter put it
    together, and send it to those that do not: first to the other expert-parallel ranks of their stage, then to the
    other stages. ``merge`` is what they do with it before that.
    """
    parameters = dict(model.named_parameters())
    like = next(iter(parameters.values()))
    for rule in rules:
        name = stage.local_name(rule)
        if name is None:
            tensors = [like.new_empty(shape, requires_grad=False) for shape in rule.hf.values()]
        else:
            group = parallel.tp_group if rule.expert is None else parallel.etp_group
            tensors = list(rule.layout.merge(all_shards(parameters[name].detach(), rule, group)))
            if merge is not None:
                tensors = merge(rule, tensors)
        owner, ep_owner = stage.stage_of(rule), stage.ep_rank_of(rule)
        if ep_owner is not None and owner == stage.rank:
            tensors = from_owner(tensors, ep_owner, parallel.ep_group)
        tensors = from_owner(tensors, owner, parallel.pp_group)
        yield from zip(rule.hf, tensors, strict=True)


def from_owner(tensors: list[torch.Tensor], owner: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The tensors of the group's rank ``owner``."""
    if group is None or group.size() == 1:
        return tensors
    found = []
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, group_src=owner, group=group)
        found.append(whole)
    return found


def all_shards(shard: torch.Tensor, rule: Rule, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Of a parameter, by tensor-parallel rank; collective over the group."""
    if group is None or group.size() == 1 or not rule.layout.sharded:
        return [shard]
    gathered = shard.new_empty((group.size() * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
    return list(gathered.chunk(group.size()))
