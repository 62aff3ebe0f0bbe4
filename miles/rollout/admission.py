"""Which finished prompt groups may be trained on: how old their tokens are, and when the weights may change. Pure.

Consumes what samples tell of the weights that made them, and the version of the weights. A group's *age* is the number
of weight versions between its oldest token and the weights that it is trained against. Invariant: from the admission of
a rollout to the end of its training, the version does not change; so no group is trained on that is older than the
bound. Whoever wants to change weights meanwhile asks first (``may_become``), and is told to let the rollout be trained
on before. A version that is told meanwhile all the same (``are``) is another number of the same weights: engines that
died with an update, which is then made again as the next. What was admitted before keeps the age that it was found to
have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miles.rollout.base_types import Group
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.utils.types import Sample

BEGUN_WITH = "begun_weight_version"
"""In the metadata of samples whose generate function tells no ``weight_versions``."""


@dataclass
class Admission:
    """See the module's docstring.

    Attributes:
        bound: ``--max-weight-staleness``; None: any age will do, and weights may change at any time.
        version: Of the weights that the next rollout is trained against; None: not known.
        under_way: The rollout that was admitted and is not trained on yet.
        judged_by: The version that it was admitted against.
    """

    bound: int | None = None
    version: int | None = None
    under_way: int | None = None
    judged_by: int | None = None

    def age(self, group: Group) -> int:
        """Weight versions between the group's oldest token and the weights; 0 if one of both is not known."""
        return 0 if self.version is None else staleness(group, self.version)

    def age_in(self, rollout_id: int, group: Group) -> int:
        """Its age in a rollout: the one that it was admitted with, if that rollout is under way."""
        if self.under_way == rollout_id and self.judged_by is not None:
            return staleness(group, self.judged_by)
        return self.age(group)

    def is_too_old(self, group: Group) -> bool:
        """Whether it may not be trained on any more: ages never sink."""
        return self.bound is not None and self.age(group) > self.bound

    def admit(self, rollout_id: int, groups: Sequence[Group]) -> list[Group]:
        """A rollout's groups go to the trainer, if none is too old. Those that are; then nothing has changed."""
        too_old = [group for group in groups if self.is_too_old(group)]
        if not too_old:
            self.under_way, self.judged_by = rollout_id, self.version
        return too_old

    def may_become(self, version: int) -> bool:
        """Weights are about to become ``version``, against which groups are judged from now on. False: they must not
        before the rollout that was admitted is trained on; nothing has changed."""
        if self.bound is None:
            return True
        if self.under_way is not None:
            return False
        self.are(version)
        return True

    def are(self, version: int | None) -> None:
        """Weights are of this version: known of an update that nothing was under way in, or that was announced."""
        if version is not None:
            self.version = max(version, self.version or 0)

    def ended(self, rollout_id: int) -> None:
        """Rollouts up to this one are trained on, or are not going to be."""
        if self.under_way is not None and self.under_way <= rollout_id:
            self.under_way = self.judged_by = None


def versions_of(sample: Sample) -> list[int]:
    """Weight versions that made its tokens; if nobody said any, that of the engines when its generation began."""
    told = [int(version) for version in sample.weight_versions if str(version).isdecimal()]
    begun = sample.metadata.get(BEGUN_WITH)
    return told or ([begun] if isinstance(begun, int) else [])


def staleness(group: Group, version: int) -> int:
    """Weight versions between the oldest token of a group and ``version``; 0 if nothing tells which made it."""
    known = [v for sample in flat(group) for v in versions_of(sample)]
    return version - min(known) if known else 0
