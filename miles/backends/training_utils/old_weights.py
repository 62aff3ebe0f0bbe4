"""``--keep-old-actor``: the weights that engines have generated with, for the log-probs of the old policy.

A snapshot is made whenever weights are handed to the engines, under the version that these report with each answer. It
holds this rank's part of what is trained, in host memory, so it costs no device memory. A pass over old log-probs puts
a snapshot in the place of the actor's weights and takes it out again, bit for bit. How many versions are kept follows
from the loop: see ``num_kept``; answers of older ones are generated again (``RolloutFnTrainInput.oldest_version``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from miles.backends.training_utils.collectives import all_gather_text
from miles.backends.training_utils.data import RankData
from miles.backends.training_utils.sleeping import SleepingMemory
from miles.backends.training_utils.storages import distinct_storages
from miles_agents.errors import ConfigError

_UNKNOWN = "?"


class NoOldWeights(ConfigError):
    """``--keep-old-actor``: a sample does not say which weights made it, or says ones that are not kept."""

    code = "E-TRAIN-031"


def num_kept(args: Any) -> int:
    """Versions whose answers may still be trained on: the engines' own and the one before, of which finished answers
    may wait in the buffer; one step ahead, engines may have got another one since the rollout began."""
    return 3 if getattr(args, "train_async", False) else 2


class OldWeights:
    """See the module's docstring.

    Args:
        weights: Gives this rank's part of what is trained, always in the same order; tensors that can be written to.
        args: The run's flags.
        device: That of collectives.
    """

    def __init__(self, weights: Callable[[], Sequence[torch.Tensor]], args: Any, device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self._num_kept = num_kept(args)
        self._snapshots: dict[int, list[torch.Tensor]] = {}
        self._unchanged: int | None = None
        self._memory = SleepingMemory(args)

    @property
    def versions(self) -> list[int]:
        """Those that are kept, oldest first."""
        return sorted(self._snapshots)

    def keep(self, version: int) -> None:
        """The engines have the actor's weights as ``version`` now."""
        self.wake_up()
        with torch.no_grad():
            self._snapshots[version] = [_on_host(weight) for weight in self._weights()]
        self._unchanged = version
        for old in self.versions[: -self._num_kept]:
            del self._snapshots[old]

    def changed(self) -> None:
        """The actor has been trained since."""
        self._unchanged = None

    @contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """The actor has these weights inside, and its own again afterwards."""
        if version == self._unchanged:
            yield
            return
        self.wake_up()
        weights = list(self._weights())
        own = [_on_host(weight) for weight in weights]
        try:
            _put(weights, self._snapshots[version])
            yield
        finally:
            _put(weights, own)

    def by_version(self, data: RankData) -> dict[int, list[list[int]]]:
        """Micro-batches of this rank's samples by the version that made them; of one that was continued, the last
        version: tokens of earlier ones are masked. All ranks have the same versions, in the same order, and as many
        micro-batches of each: empty ones keep a rank in step. Collective.

        Raises:
            NoOldWeights: On all ranks alike.
        """
        versions = [_version(said) for said in data.columns.get("weight_versions", [()] * len(data))]
        # One without a trained token may not have been generated at all: its log-probs count for nothing.
        trained = [bool(mask.any()) for mask in data.loss_masks]
        newest = str(max(self._snapshots, default=0))
        own = [
            str(version) if version is not None else _UNKNOWN if is_trained else newest
            for version, is_trained in zip(versions, trained, strict=True)
        ]
        found = {said: data.packed([i for i, of in enumerate(own) if of == said]) for said in sorted(set(own))}
        told = all_gather_text(" ".join(f"{said}:{len(of)}" for said, of in found.items()), self._device)
        most: dict[str, int] = {}
        for said, _, count in (entry.partition(":") for text in told for entry in text.split()):
            most[said] = max(most.get(said, 0), int(count))
        unknown = sorted(set(most) - {str(version) for version in self._snapshots})
        if unknown:
            raise _no_old_weights(unknown, self.versions)
        return {
            version: (batches := found.get(str(version), [])) + [[] for _ in range(most[str(version)] - len(batches))]
            for version in self.versions
            if str(version) in most
        }

    def sleep(self, level: int) -> None:
        """At level 2 with ``--offload-train-target disk`` snapshots go there, too.

        Raises:
            CannotSleep: They could not be written; they are in memory then.
        """
        if level < 2 or self._memory.level == 2:
            return
        self._memory.put_away(distinct_storages(part for parts in self._snapshots.values() for part in parts))
        self._memory.level = 2
        self._memory.give_back()

    def wake_up(self) -> None:
        """Have them in memory again.

        Raises:
            CannotSleep: They cannot be read.
        """
        self._memory.wake_up()

    def close(self) -> None:
        """Give files back."""
        self._memory.close()


def _version(said: Sequence[Any]) -> int | None:
    """The last one that an engine reported of a sample. None: none, or none that is a number."""
    return int(said[-1]) if said and str(said[-1]).isdecimal() else None


def _on_host(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to("cpu", copy=True)


def _put(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def _no_old_weights(unknown: Sequence[str], kept: Sequence[int]) -> NoOldWeights:
    named = ", ".join(version for version in unknown if version != _UNKNOWN)
    have = ", ".join(map(str, kept)) or "none"
    if not named:
        return NoOldWeights(
            "--keep-old-actor: there are samples of which it is not known what weights made them",
            evidence=f"their weight_versions are empty, or no numbers; kept are the versions {have}",
            advice="Let the generate function take over what engines report (Sample.update_from_meta_info), "
            "or leave --keep-old-actor out.",
        )
    return NoOldWeights(
        f"--keep-old-actor: there are samples of weights that are not kept: version {named}",
        evidence=f"kept are the versions {have}",
        advice="Let the rollout function generate answers of older versions again "
        "(RolloutFnTrainInput.oldest_version), or leave --keep-old-actor out.",
    )
