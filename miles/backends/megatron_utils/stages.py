"""What of the whole model this rank holds: a pipeline stage's layers, and some of the experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from miles.backends.base import ParallelState
from miles.backends.megatron_utils.errors import UnsupportedParallelism
from miles.backends.megatron_utils.families import Rule, Shape

EMBEDDING, OUTPUT = "embedding.", "output_layer."


@dataclass(frozen=True)
class Stage:
    """See the module's docstring.

    Attributes:
        rank: Pipeline stage of this rank.
        size: Stages.
        layers: Layers of each stage.
        first_expert: Number of this rank's first expert.
        num_experts: How many it has.
        tied: The output layer's weight is the embedding's.
    """

    rank: int
    size: int
    layers: tuple[range, ...]
    first_expert: int
    num_experts: int
    tied: bool

    @classmethod
    def of(cls, config: TransformerConfig, shape: Shape, parallel: ParallelState) -> Stage:
        """Of this rank."""
        layers = []
        for rank in range(parallel.pp_size):
            first = get_transformer_layer_offset(config, pp_rank=rank)
            layers.append(range(first, first + get_num_layers_to_build(config, pp_rank=rank)))
        experts = shape.experts.count if shape.experts is not None else 0
        own = experts // parallel.ep_size
        return cls(parallel.pp_rank, parallel.pp_size, tuple(layers), parallel.ep_rank * own, own, shape.tied)

    def stage_of(self, rule: Rule) -> int:
        """Which stage holds a parameter."""
        if rule.layer is not None:
            return next(rank for rank, layers in enumerate(self.layers) if rule.layer in layers)
        return 0 if rule.megatron.startswith(EMBEDDING) else self.size - 1

    def ep_rank_of(self, rule: Rule) -> int | None:
        """Which expert-parallel rank holds it; None: all of them."""
        return None if rule.expert is None else rule.expert // self.num_experts

    def local_name(self, rule: Rule) -> str | None:
        """What the parameter is called in this rank's model; None if it is not there."""
        if self.stage_of(rule) != self.rank:
            return None
        name = rule.megatron
        if rule.expert is not None:
            if not 0 <= rule.expert - self.first_expert < self.num_experts:
                return None
            number = rule.expert - self.first_expert
            name = re.sub(r"local_experts\.\d+\.", f"local_experts.{number}.", name)
        if rule.layer is not None:
            number = rule.layer - self.layers[self.rank].start
            name = re.sub(r"^decoder\.layers\.\d+\.", f"decoder.layers.{number}.", name)
        return name

    def local_rules(self, rules: Sequence[Rule]) -> list[tuple[str, Rule]]:
        """Names in this rank's model, and the rules that fill them. The last of several stages has a copy of a tied
        embedding."""
        found = [(name, rule) for rule in rules if (name := self.local_name(rule)) is not None]
        if self.tied and self.size > 1 and self.rank == self.size - 1:
            found += [(OUTPUT + "weight", rule) for rule in rules if rule.megatron.startswith(EMBEDDING)]
        return found


def check_experts(shape: Shape, parallel: ParallelState, *, sequence_parallel: bool) -> None:
    """What megatron.core would refuse, or get wrong, with experts.

    Raises:
        UnsupportedParallelism: Names the flag.
    """
    experts = shape.experts
    if experts is None:
        if parallel.ep_size > 1:
            raise UnsupportedParallelism(
                f"--expert-model-parallel-size {parallel.ep_size} needs a model with experts",
                evidence=f"models of type {shape.model_type} have none",
                advice="Leave --expert-model-parallel-size out.",
            )
        return
    if experts.count % parallel.ep_size:
        raise UnsupportedParallelism(
            f"--expert-model-parallel-size {parallel.ep_size} does not divide the experts",
            evidence=f"{experts.count} experts",
            advice="Choose a size that divides them.",
        )
    if parallel.tp_size > 1 and not sequence_parallel:
        raise UnsupportedParallelism(
            "experts with tensor parallelism need --sequence-parallel",
            evidence=f"--tensor-model-parallel-size {parallel.tp_size}",
            advice="Give --sequence-parallel, too.",
        )
    if parallel.ep_size == 1 and parallel.etp_size not in (1, parallel.tp_size):
        raise UnsupportedParallelism(
            f"--expert-tensor-parallel-size {parallel.etp_size} is neither 1 nor --tensor-model-parallel-size",
            evidence=f"--tensor-model-parallel-size {parallel.tp_size}, and experts are on each rank",
            advice="Choose one of the two, or an --expert-model-parallel-size above 1.",
        )
    if experts.ffn % parallel.etp_size:
        raise UnsupportedParallelism(
            f"--expert-tensor-parallel-size {parallel.etp_size} does not divide an expert",
            evidence=f"its width is {experts.ffn}",
            advice="Choose a size that divides it.",
        )
