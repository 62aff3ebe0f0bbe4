"""Weights between a Hugging Face directory, or full tensors of its names, and a model cut by tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from miles.backends.hf_directory import HFDirectory
from miles.backends.megatron_utils.errors import BadModelDirectory
from miles.backends.megatron_utils.families import Rule

IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Ends of names that a directory may hold without the model needing them: computed, or a copy of a tied embedding."""


def load_hf_weights(
    model: torch.nn.Module, rules: Sequence[Rule], directory: HFDirectory, *, tp_rank: int, tp_size: int
) -> None:
    """Fill the parameters of ``model`` from the directory. Files are mapped, and only this rank's part is read.

    Raises:
        BadModelDirectory: A tensor is missing, left over, or of another shape.
    """
    parameters = dict(model.named_parameters())
    assert set(parameters) == {rule.megatron for rule in rules}, "the table of names does not fit the model"
    _compare_names(rules, directory)
    with torch.no_grad(), directory.opened() as opened:
        for rule in rules:
            tensors = [opened.tensor(name) for name in rule.hf]
            _compare_shapes(rule, tensors, directory)
            parameters[rule.megatron].copy_(rule.layout.shard(tensors, tp_rank, tp_size))


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
    extra = sorted(name for name in directory.names - expected if not name.endswith(IGNORED))
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


def full_tensors(
    model: torch.nn.Module, rules: Sequence[Rule], group: dist.ProcessGroup | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors; collective over the tensor-parallel ``group``.

    A tensor may share memory with the model, and is valid until the next one is asked for.
    """
    parameters = dict(model.named_parameters())
    for rule in rules:
        shards = _all_shards(parameters[rule.megatron].detach(), rule, group)
        yield from zip(rule.hf, rule.layout.merge(shards), strict=True)


def _all_shards(shard: torch.Tensor, rule: Rule, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    if group is None or group.size() == 1 or not rule.layout.sharded:
        return [shard]
    gathered = shard.new_empty((group.size() * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
    return list(gathered.chunk(group.size()))
