"""A data source whose groups are all accounted for: every taking and every end is told to the ledger and the journal.

Consumes groups of the user's or our own data source; hands them out and takes them back. Invariants: no group leaves
without an entry in the ledger; what the data source itself does not take back is kept here, and handed out first.
Calls come from any thread. The data source itself gets one at a time: who takes groups waits for its turn; groups that
are given back meanwhile wait here, not their thread, which may be the loop that the data source's code needs.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from miles.rollout.admission import Admission
from miles.rollout.base_types import Group
from miles.rollout.data_source import DataSource, NoBuffer
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.hooks import Hook, HookFailed
from miles.rollout.journal import Journal
from miles.rollout.ledger import Ledger, Transition
from miles.utils.types import Sample, SampleStatus

T = TypeVar("T")


class TrackedDataSource(DataSource):
    """See the module's docstring. What it does not have itself is looked up in the data source that it wraps."""

    def __init__(self, inner: DataSource) -> None:
        self.inner = inner
        self.ledger = Ledger()
        self.admission = Admission()
        self.serving: int | None = None
        """The version that engines have: of what is begun now. Not the one that is announced."""
        self.journal: Journal | None = None
        self.rollout_id = 0
        self.overflow: list[Group] = []
        self._open: dict[int, Group] = {}
        self._finished: set[int] = set()
        self._next_group = 0
        self._next_index = 0
        self._lock = threading.RLock()
        self._quiet = threading.Condition()
        self._num_moves = 0
        """How many moves of groups between the data source and here are under way: then neither side is complete."""
        self._is_cutting = False
        self.saving = asyncio.Lock()
        self._turn = threading.RLock()
        """Of the thread that calls the data source. Taken before ``_lock``, never inside it."""
        self._coming_back: list[Group] = []
        """Groups that the ledger calls returned, and that are on their way to the data source."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    # -- what rollout functions use --------------------------------------------------------------------------

    def get_samples(self, num_samples: int) -> list[Group]:
        """Take groups."""
        with self._move():
            return self._take(num_samples)

    def _take(self, num_samples: int) -> list[Group]:
        with self._lock:
            groups, self.overflow = self.overflow[:num_samples], self.overflow[num_samples:]
        try:
            with self._turn:
                groups = self._filled(groups, num_samples)
                self._enter(groups)
        finally:
            self._bring_back()
        return groups

    def _filled(self, groups: list[Group], num_samples: int) -> list[Group]:
        if len(groups) == num_samples:
            return groups
        try:
            return groups + self._taken(num_samples - len(groups))
        except BaseException:
            with self._lock:
                self.overflow[:0] = groups
            raise

    def _enter(self, groups: Sequence[Group]) -> None:
        with self._lock:
            steps = []
            for group in groups:
                number = self._number(group)
                source = "buffer" if number in self.ledger.returned else "fresh"
                steps.append(Transition("take", number, self.rollout_id, source))
                self._open[number] = group
            steps += self._discarded()
            self._apply(steps)

    def _taken(self, count: int) -> list[Group]:
        """Groups of the data source itself.

        Raises:
            HookFailed, BadHookResult: It is the user's.
        """
        groups = self._call(self.inner.get_samples, count)
        if not isinstance(groups, list | tuple) or not all(_is_group(group) for group in groups):
            wanted = "a list of groups, each a list of Sample, from get_samples"
            raise self._hook(self.inner.get_samples).bad_result(groups, wanted)
        return list(groups)

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """A method of the data source. Only errors of the user's are told as such."""
        return method(*args) if type(self.inner).__module__.startswith("miles.") else self._hook(method).call(*args)

    def _hook(self, method: Callable[..., Any]) -> Hook:
        return Hook("--data-source-path", f"{type(self.inner).__module__}.{type(self.inner).__qualname__}", method)

    def _discarded(self) -> list[Transition]:
        """Groups that a buffer filter took out of the buffer and did not give out."""
        groups: list[Group] = getattr(self.inner, "discarded", [])
        numbers = [n for group in groups if (n := self._number(group)) in self.ledger.returned]
        groups.clear()
        return [
            step
            for n in numbers
            for step in (
                Transition("take", n, self.rollout_id, "buffer"),
                Transition("filter", n, self.rollout_id, "buffer_filter"),
            )
        ]

    def add_samples(self, samples: list[Group]) -> None:
        """Give groups back."""
        self.give_back(samples, "returned")

    def give_back(self, groups: Sequence[Group], why: str) -> None:
        """Give groups back, and say why. One that is back already is left alone."""
        with self._lock:
            numbered: dict[int, Group] = {}
            for group in groups:
                if (number := self._number(group)) not in self.ledger.returned:
                    numbered.setdefault(number, []).extend(group)  # one prompt's samples may come as several groups
            foreign = [n for n in numbered if n not in self.ledger.open]
            self._apply([Transition("take", n, self.rollout_id, "foreign") for n in foreign])
            self._end(numbered, "give_back", why)
            self._coming_back += numbered.values()
        self._bring_back()

    def _bring_back(self) -> None:
        """Give the data source what comes back, unless another thread calls it or saves it: that one does this when it
        leaves. Nobody waits here."""
        while self._coming_back and self._begin_move(waits=False):
            try:
                if not self._turn.acquire(blocking=False):
                    return
                try:
                    with self._lock:
                        groups, self._coming_back = self._coming_back, []
                    self._add(groups)
                finally:
                    self._turn.release()
            finally:
                self._end_move()

    def _add(self, groups: list[Group]) -> None:
        if not groups:
            return
        try:
            self._call(self.inner.add_samples, groups)
        except BaseException as error:
            with self._lock:
                self.overflow += groups  # whatever it is: the ledger calls them returned, so they have to be somewhere
            has_none = isinstance(error, HookFailed) and isinstance(error.__cause__, NotImplementedError)
            if not has_none and not isinstance(error, NoBuffer):
                raise

    def finished(self, group: Group) -> None:
        """A group that was taken is generated, and waits to be selected: a checkpoint keeps what was made of it."""
        with self._lock:
            number = self._number(group)
            if number in self._open:
                self._open[number] = group
                self._finished.add(number)

    def filtered(self, groups: Sequence[Group], reason: str) -> None:
        """Groups that are not trained on, and why."""
        with self._lock:
            self._end([self._number(group) for group in groups], "filter", reason)

    def save(self, rollout_id: int) -> None:
        """The position of the data source itself; what is here is in ``checkpoint``."""
        self.inner.save(rollout_id)

    def load(self, rollout_id: int | None = None) -> None:
        """Inverse of ``save``."""
        self.inner.load(rollout_id)

    def get_buffer_length(self) -> int | None:
        """Groups that came back and wait."""
        length = self.inner.get_buffer_length()
        kept = len(self.overflow) + len(self._coming_back)
        return kept if length is None else length + kept

    def too_old(self, groups: Sequence[Group]) -> list[Group]:
        """Those that may not be trained on any more."""
        with self._lock:
            return [group for group in groups if self.admission.is_too_old(group)]

    def admit(self, rollout_id: int, groups: Sequence[Group]) -> list[Group]:
        """See ``Admission.admit``."""
        with self._lock:
            return self.admission.admit(rollout_id, groups)

    # -- what the rollout manager uses -----------------------------------------------------------------------

    def bound_staleness(self, bound: int | None) -> None:
        """No group that is older is selected from now on."""
        with self._lock:
            self.admission.bound = self.ledger.bound = bound

    def weights_are(self, version: int | None, *, announced: bool = False) -> None:
        """See ``Admission.are``. ``announced``: engines are about to get them, and have others still."""
        with self._lock:
            self.admission.are(version)
            if version is not None and not announced:
                self.serving = max(version, self.serving or 0)

    def may_become(self, version: int) -> bool:
        """See ``Admission.may_become``."""
        with self._lock:
            return self.admission.may_become(version)

    def is_under_way(self, rollout_id: int | None) -> None:
        """What was restored has a rollout that was admitted and is not trained on, or none."""
        with self._lock:
            self.admission.under_way = rollout_id

    def not_trained(self, rollout_id: int) -> None:
        """The rollout failed after it was admitted: it will not be trained on as it is."""
        with self._lock:
            self.admission.ended(rollout_id)

    def attach(self, journal: Journal) -> None:
        """Write everything to this journal from now on."""
        with self._lock:
            self.journal = journal
            journal.state(self.ledger, "begin")

    def begin(self, rollout_id: int) -> None:
        """Groups are taken for this rollout from now on."""
        with self._lock:
            self.rollout_id = rollout_id

    def select(self, groups: Sequence[Group]) -> None:
        """These go to the trainer. Groups that were not taken from here are entered as foreign."""
        with self._lock:
            steps = []
            seen: set[int] = set()
            for group in groups:
                number = self._number(group)
                if number in seen:  # one prompt's samples, given as several groups
                    self._open[number] = [*self._open[number], *group]
                    continue
                seen.add(number)
                if number not in self.ledger.open:
                    steps.append(Transition("take", number, self.rollout_id, "foreign"))
                steps.append(
                    Transition("select", number, self.rollout_id, age=self.admission.age_in(self.rollout_id, group))
                )
                self._open[number] = group
            self._apply(steps)
            self._sync()

    def _age(self, group: Group) -> int:
        return self.admission.age_in(self.rollout_id, group)

    def drop_unselected(self, reason: str) -> int:
        """Groups of this rollout that were taken and did not come out of it: how many."""
        with self._lock:
            numbers = self.ledger.of_rollout(self.rollout_id, selected=False)
            self._end(numbers, "filter", reason)
        return len(numbers)

    def take_back_open(self, rollout_id: int, why: str) -> int:
        """Groups of a rollout that failed go to the buffer, without what was generated: how many."""
        with self._lock:
            numbers = [n for n, of in self.ledger.open.items() if of == rollout_id]
            groups = [reset_group(self._open[n]) for n in numbers]
            self._end(numbers, "give_back", why)
            self._coming_back += groups
        self._bring_back()
        return len(groups)

    def trained(self, rollout_id: int) -> int:
        """The rollout's groups were trained on: how many."""
        with self._lock:
            numbers = self.ledger.of_rollout(rollout_id, selected=True)
            self._end(numbers, "train", "")
            self.admission.ended(rollout_id)
            self._sync()
        return len(numbers)

    def cut(self, save: Callable[[], None], take: Callable[[], T]) -> T:
        """``save`` the data source and ``take`` what is here at one moment: no group moves in between. It waits, on
        the thread that calls it, until none is being taken or brought back. Who takes one meanwhile waits; what is
        given back meanwhile stays here, in what ``take`` finds, and is brought back afterwards."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._num_moves and not self._is_cutting)
            self._is_cutting = True
        try:
            save()
            return take()
        finally:
            with self._quiet:
                self._is_cutting = False
                self._quiet.notify_all()
            self._bring_back()

    @contextmanager
    def _move(self) -> Iterator[None]:
        """A group is taken inside. Moves do not wait for each other, a data source may be slow."""
        self._begin_move(waits=True)
        try:
            yield
        finally:
            self._end_move()

    def _begin_move(self, *, waits: bool) -> bool:
        with self._quiet:
            if self._is_cutting and not waits:
                return False
            self._quiet.wait_for(lambda: not self._is_cutting)
            self._num_moves += 1
        return True

    def _end_move(self) -> None:
        with self._quiet:
            self._num_moves -= 1
            self._quiet.notify_all()

    def checkpoint(self) -> tuple[dict[str, Any], list[Group]]:
        """What has to be saved beside the data source: plain values, and groups.

        A group that is being generated counts as returned, without what was generated of it; one that is generated
        and not trained on yet, with it.
        """
        with self._lock:
            return self._plain(frozenset(), "checkpoint"), [
                *self.overflow,
                *self._coming_back,
                *self._under_way(self._open),
            ]

    def snapshot(self) -> tuple[dict[str, Any], list[Group]]:
        """The same, but groups that are selected stay so: the trainer has them, or is about to. They come first."""
        with self._lock:
            selected = self.ledger.selected
            kept = [copy.deepcopy(group) for number, group in self._open.items() if number in selected]
            others = [number for number in self._open if number not in selected]
            plain = {**self._plain(selected, "snapshot"), "num_selected": len(kept)}
            return plain, [*kept, *self.overflow, *self._coming_back, *self._under_way(others)]

    def _plain(self, kept: Collection[int], why: str) -> dict[str, Any]:
        return {
            "ledger": self.ledger.closed(why, kept).to_plain(),
            "next_group": self._next_group,
            "next_index": self._next_index,
        }

    def _under_way(self, numbers: Iterable[int]) -> list[Group]:
        return [
            copy.deepcopy(self._open[number])
            if number in self.ledger.selected or number in self._finished
            else reset_group(copy.copy(self._open[number]))
            for number in numbers
        ]

    def restore(self, plain: dict[str, Any], groups: Iterable[Group]) -> None:
        """Inverse of ``checkpoint`` and ``snapshot``; whatever is open is forgotten."""
        found = list(groups)
        num_selected = plain.get("num_selected", 0)
        with self._lock:
            self.ledger = Ledger.from_plain(plain["ledger"])
            self.ledger.bound = self.admission.bound
            self._next_group, self._next_index = plain["next_group"], plain["next_index"]
            self._open = {self._number(group): group for group in found[:num_selected]}
            self._finished.clear()
            self._coming_back.clear()
            self.overflow = found[num_selected:]
            if self.journal is not None:
                self.journal.state(self.ledger, "restored from a checkpoint")

    def close(self) -> None:
        """Give the journal back."""
        if self.journal is not None:
            self.journal.close()

    # -- parts -----------------------------------------------------------------------------------------------

    def _number(self, group: Group) -> int:
        """The group's number; groups and samples of sources that give none get one."""
        samples = flat(group)
        number = next((s.group_index for s in samples if s.group_index is not None), None)
        if number is None:
            number = self._next_group
        self._next_group = max(self._next_group, number + 1)
        for sample in samples:
            if sample.group_index is None:
                sample.group_index = number
            if sample.index is None:
                sample.index = self._next_index
            self._next_index = max(self._next_index, sample.index + 1)
        return number

    def _end(self, numbers: Iterable[int], kind: Any, why: str) -> None:
        steps = [Transition(kind, n, self.ledger.open.get(n, self.rollout_id), why) for n in numbers]
        self._apply(steps)
        for step in steps:
            self._open.pop(step.group, None)
            self._finished.discard(step.group)

    def _apply(self, steps: Sequence[Transition]) -> None:
        for step in steps:
            self.ledger.apply(step)
        if self.journal is not None:
            self.journal.append(steps)

    def _sync(self) -> None:
        if self.journal is not None:
            self.journal.sync()


def reset_group(group: Group) -> Group:
    """The group as it was before it was generated: of several samples that one execution made, the first is kept."""
    fresh: Group = []
    for entry in group:
        sample = copy.copy(entry[0] if isinstance(entry, list) else entry)
        sample.reset_for_retry()
        fresh.append(sample)
    return fresh


def _is_group(group: Any) -> bool:
    return isinstance(group, list) and bool(group) and all(isinstance(sample, Sample) for sample in flat(group))


def is_complete(group: Group) -> bool:
    """Whether nothing of the group is left to generate."""
    return all(s.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED, SampleStatus.FAILED) for s in flat(group))
