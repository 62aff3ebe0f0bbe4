"""Which experts the tokens of a rollout are given to, kept from one pass to another ("routing replay").

A router's choice jumps where two experts are nearly as good. Between the pass for old log-probabilities and that for
gradients (after an optimizer step), or between engine and trainer (another order of sums), such jumps change the ratio
of a token by far more than the weights did. Replay takes the choice from the earlier pass and keeps everything else:
the weights of the chosen experts are computed anew, with gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from miles.utils.train_data import ROUTED_EXPERTS
from miles_agents.errors import ConfigError


class BadRoutedExperts(ConfigError):
    """Recorded experts do not fit the sample, or the model."""

    code = "E-TRAIN-030"


class Routing:
    """Of one rollout, on one rank: what the passes of the model that is trained record, and what they replay.

    Attributes:
        given: What engines have recorded, by sample: integers ``[T_i - 1, layers, k]``; every pass replays it. None:
            the pass for old log-probabilities records, and training replays that.
        recorded: By sample, what this rank's routers chose: int16 or int32 ``[T_i, own layers, k]`` on the CPU; -1 for
            tokens of other context-parallel ranks.
        records: The pass that runs is the one that records.
    """

    def __init__(self, given: Sequence[torch.Tensor] | None) -> None:
        self.given = given
        self.recorded: dict[int, torch.Tensor] = {}
        self.records = False

    @classmethod
    def of(cls, args: Any, given: Sequence[torch.Tensor] | None) -> Routing | None:
        """As the flags say; None: routers choose in every pass.

        Raises:
            BadRoutedExperts: The engines' choices are to be replayed, and the samples have none.
        """
        if getattr(args, "use_rollout_routing_replay", False):
            if given is None:
                raise BadRoutedExperts(
                    f"the samples of this rollout have no {ROUTED_EXPERTS}",
                    evidence="--use-rollout-routing-replay takes the experts of each token from there",
                    advice="Let the generate function keep what engines answer, load data that was recorded with it, "
                    "or use --use-routing-replay alone.",
                )
            return cls(given)
        return cls(None) if getattr(args, "use_routing_replay", False) else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes within record, unless engines have."""
        self.records = self.given is None
        try:
            yield
        finally:
            self.records = False

    def experts(self, sample: int, length: int, layers: Sequence[int]) -> torch.Tensor:
        """Integers ``[length, len(layers), k]`` of a sample's tokens; -1 where the router is to choose.

        Args:
            sample: Place in the rank's data.
            length: Its tokens.
            layers: Of the whole model; ``recorded`` has these and no others.

        Raises:
            BadRoutedExperts: They have another shape.
        """
        if self.given is None:
            return self.recorded[sample]
        found = self.given[sample]
        if found.dim() != 3 or found.shape[0] != length - 1 or found.shape[1] <= max(layers):
            raise BadRoutedExperts(
                f"{ROUTED_EXPERTS} of sample {sample} does not fit",
                evidence=f"shape {tuple(found.shape)}; {length} tokens, {max(layers) + 1} layers or more",
                advice="It is [tokens - 1, layers, experts per token], with a row of -1 for what is not known.",
                sample=sample,
            )
        return torch.cat([found[:, list(layers)], found.new_full((1, len(layers), found.shape[2]), -1)])
