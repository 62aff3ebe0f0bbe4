"""The rollout ledger: where every prompt group is. A state machine without I/O.

Consumes transitions; produces the state after them, or refuses. Invariants: each taking of a group from the data
source ends exactly once, as *trained*, *filtered* with a reason, or *returned* to the buffer; a group that is open
(taken, or selected for a rollout that is not trained yet) cannot be taken; ``taken`` equals the sum of the three ends
and the open groups.

::

    (unknown, or returned) --take--> taken --select--> selected --train--> trained
                                       |--filter--> filtered  <--filter-- selected
                                       '--give_back--> returned  <--give_back-- selected

A group belongs to the rollout that it was taken for, and from its selection on to the one that it was selected for:
fully asynchronous generation takes groups before it is known which rollout they will be of. A selected group is
filtered if only some of its samples are trained on. With a bound on staleness, no group is selected whose oldest token
is older.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from miles_agents.errors import InternalError

Source = Literal["fresh", "buffer", "foreign"]
"""``foreign``: a rollout function made the group without the data source."""
Kind = Literal["take", "select", "filter", "give_back", "train"]


class ImpossibleTransition(InternalError):
    """The ledger is told something of a prompt group that cannot have happened."""

    code = "E-ROLL-004"


@dataclass(frozen=True)
class Transition:
    """One step of one group.

    Attributes:
        kind: What happened.
        group: The group's number.
        rollout_id: For which rollout.
        why: Source of a taking, reason of a filtering or giving back.
        age: Of a selection: weight versions between the group's oldest token and the weights it is trained against.
    """

    kind: Kind
    group: int
    rollout_id: int
    why: str = ""
    age: int = 0


@dataclass
class Ledger:
    """See the module's docstring.

    Attributes:
        open: Rollout id of each group that is taken, or selected (then it is in ``selected``, too).
        returned: Groups that are in the buffer.
        reasons: How many groups were filtered, by reason.
        oldest: The greatest age of a group that was selected.
        bound: The greatest age of a group that may be selected; None: any. Not part of what is saved: it is the run's.
    """

    open: dict[int, int] = field(default_factory=dict)
    selected: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)
    taken: Counter[str] = field(default_factory=Counter)
    given_back: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    num_trained: int = 0
    sequence: int = 0
    oldest: int = 0
    bound: int | None = field(default=None, compare=False)

    @property
    def num_taken(self) -> int:
        """Takings so far."""
        return self.taken.total()

    @property
    def num_filtered(self) -> int:
        """Takings that ended as filtered."""
        return self.reasons.total()

    @property
    def num_returned(self) -> int:
        """Takings that ended in the buffer."""
        return self.given_back.total()

    def apply(self, step: Transition) -> None:
        """Take a step.

        Raises:
            ImpossibleTransition: It cannot be; the ledger is as before.
        """
        self._check(step)
        group = step.group
        if step.kind == "take":
            self.open[group] = step.rollout_id
            self.returned.discard(group)
            self.taken[step.why or "fresh"] += 1
        elif step.kind == "select":
            self.selected.add(group)
            self.oldest = max(self.oldest, step.age)
            self.open[group] = step.rollout_id
        else:
            del self.open[group]
            self.selected.discard(group)
            self._end(step)
        self.sequence += 1

    def _end(self, step: Transition) -> None:
        if step.kind == "train":
            self.num_trained += 1
        elif step.kind == "filter":
            self.reasons[step.why] += 1
        else:
            self.returned.add(step.group)
            self.given_back[step.why] += 1

    def _check(self, step: Transition) -> None:
        is_open, is_selected = step.group in self.open, step.group in self.selected
        wrong = ""
        if step.kind == "take":
            if is_open:
                wrong = f"it is taken already, for rollout {self.open[step.group]}"
            elif step.why == "buffer" and step.group not in self.returned:
                wrong = "it was not in the buffer"
            elif step.why != "buffer" and step.group in self.returned:
                wrong = "it is in the buffer"
        elif not is_open:
            wrong = "it is not taken"
        elif step.kind == "train" and not is_selected:
            wrong = "it was not selected"
        elif step.kind == "select" and is_selected:
            wrong = "it is selected already"
        elif step.kind == "select" and self.bound is not None and step.age > self.bound:
            wrong = f"its oldest token is {step.age} weight versions old, and the bound is {self.bound}"
        elif step.kind == "filter" and not step.why:
            wrong = "no reason is given"
        if wrong:
            raise ImpossibleTransition(
                f"prompt group {step.group} cannot {step.kind.replace('_', ' ')}",
                evidence=f"{wrong}; for rollout {step.rollout_id}; {self.describe()}",
                advice="Two groups with the same group_index, or one group used twice, look like this; "
                "if no user code makes groups, report it.",
            )

    def of_rollout(self, rollout_id: int, *, selected: bool) -> list[int]:
        """Open groups of a rollout: the selected ones, or those that are only taken."""
        return [g for g, of in self.open.items() if of == rollout_id and (g in self.selected) == selected]

    def describe(self) -> str:
        """One line of counts."""
        return (
            f"{self.num_taken} taken = {self.num_trained} trained + {self.num_filtered} filtered + "
            f"{self.num_returned} returned + {len(self.open)} open"
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "open": [[group, rollout_id] for group, rollout_id in sorted(self.open.items())],
            "selected": sorted(self.selected),
            "returned": sorted(self.returned),
            "taken": dict(self.taken),
            "given_back": dict(self.given_back),
            "reasons": dict(self.reasons),
            "num_trained": self.num_trained,
            "sequence": self.sequence,
            "oldest": self.oldest,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Ledger:
        """Inverse of ``to_plain``."""
        return cls(
            open={int(group): int(rollout_id) for group, rollout_id in plain["open"]},
            selected=set(plain["selected"]),
            returned=set(plain["returned"]),
            taken=Counter(plain["taken"]),
            given_back=Counter(plain["given_back"]),
            reasons=Counter(plain["reasons"]),
            num_trained=int(plain["num_trained"]),
            sequence=int(plain["sequence"]),
            oldest=int(plain.get("oldest", 0)),
        )

    def closed(self, why: str, kept: Collection[int] = ()) -> Ledger:
        """A copy in which every open group but those that are ``kept`` is in the buffer: what a checkpoint holds."""
        copy = Ledger.from_plain(self.to_plain())
        for group, rollout_id in list(copy.open.items()):
            if group in kept:
                continue
            copy.apply(Transition("give_back", group, rollout_id, why))
        return copy
