"""Loads buckets into an engine's model: by its ``load_weights`` first, and as few launches once that is known.

``load_weights`` goes through names and copies tensor by tensor, from Python: on a GPU that takes twenty times as long
as the bytes need. What it does with a bucket of given names, dtypes, shapes and places is always the same copies, so
they are recorded and done again without it. Three uses of a bucket of the same layout:

1. *Recorded* (``record_copies``) while ``load_weights`` runs. A model that does anything but plain copies with
   a bucket, such as arithmetic or ``.item()``, is left to ``load_weights`` for good (quantised models, absorbed
   projections): all of it, as it may put something by in one call and use it in another.
2. *Checked*. A recorder sees one thread and the dispatcher, and a model may copy in others, or by kernels of its own.
   So: invert all bits of the model (its parameters and buffers), replay, sum all bits, ``load_weights`` (which is
   recorded once more and must do the same), sum again. A place that ``load_weights`` writes and the plan does not
   holds inverted bits of an older weight at the first sum and a weight at the second. They differ, whether or not
   the weight has changed since, so an update that changes little proves as much as any other. A difference ends the
   use of plans for this model. Then all bits are inverted back and ``load_weights`` runs a last time: it mends what
   that spoilt, so that the model holds what ``load_weights`` alone would have left, whatever the check has found. On
   a GPU the device is idle meanwhile: nothing may compute with such weights. For each bucket that is four times
   reading the whole model, once in its life.
3. *Replayed* from then on, in the current stream.

What this takes for granted: what ``load_weights`` copies depends on the bucket's layout, the parameters and the places
of experts (``expert_places``), and on nothing else that changes while an engine serves; and it keeps nothing outside
parameters and buffers, unless this thread copies or computes that, which is seen.
Parameters and buffers that lie elsewhere by now (``begin``) make all plans void; memory that was released and taken
back at the same addresses (memory saver) does not: a plan writes all that ``load_weights`` wrote, fills included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from miles.backends.sglang_utils.copy_plan import Extent, Step, arrange, contested
from miles.backends.sglang_utils.expert_places import expert_places
from miles.backends.sglang_utils.model_memory import ModelMemory, Places, storages_of
from miles.backends.sglang_utils.record_copies import CopyRecorder
from miles.backends.sglang_utils.replay_copies import InPlace, Replay, views
from miles.backends.weight_update.buckets import Entry

logger = logging.getLogger(__name__)
_ALIGNMENT = 16
"""Of a bucket in its storage, for a replay."""
Key = tuple[tuple[str, torch.dtype, tuple[int, ...], int, tuple[int, ...] | None], ...]


@dataclass(slots=True)
class _Known:
    """A layout of which a bucket was loaded. ``entries``: the tuple that told of it last; kept, so that no other gets
    its ``id``."""

    steps: tuple[Step, ...]
    replay: Replay
    used: int
    trusted: bool = False
    in_place: InPlace | None = None
    entries: tuple[Entry, ...] | None = None


class LoadPlans:
    """Of one model in one process, kept between updates. Calls come from one thread.

    Keeps the storages of the model's parameters alive until ``begin`` finds that they are elsewhere; of buckets it
    keeps nothing.

    Args:
        model: As SGLang has made it.
        state: What ``load_weights`` goes by beside the bucket and the parameters' places, as something that can be
            compared; plans are void once it differs. None: it cannot be told, so there are no plans.

    Attributes:
        recorded, checked, replayed, plain: How many buckets were loaded in which way; ``plain``: by ``load_weights``
            alone.
        placed: How many were received where the model keeps them, in part or as a whole; they are not ``replayed``.
        refusal: Why this model is left to ``load_weights``; empty: it is not.
    """

    def __init__(self, model: Any, state: Callable[[], object] = expert_places) -> None:
        self.recorded = self.checked = self.replayed = self.plain = self.placed = 0
        self.refusal = ""
        self._model = model
        self._known: dict[Key, _Known] = {}
        self._by_entries: dict[int, _Known] = {}
        self._places = Places()
        self._read_state = state
        self._state: object = None
        self._updates = 0
        self._contested: list[Extent] | None = None

    def begin(self) -> None:
        """Before an update's first bucket.

        Forgets plans whose parameters are elsewhere by now, and those that the last two updates had no use for.
        """
        state = self._read_state()
        before = len(self._known)
        if self._places.changed(self._model) or state != self._state:
            self._known.clear()
        self._state = state
        self._updates += 1
        self._known = {key: known for key, known in self._known.items() if known.used >= self._updates - 2}
        if len(self._known) < before:
            self._contested = None
        self._by_entries = {id(k.entries): k for k in self._known.values() if k.entries is not None}

    def load(self, entries: Sequence[Entry], memory: torch.Tensor, *, beside_broadcast: bool = False) -> None:
        """Load the tensors of one bucket.

        Does not wait for the device, except for the check: the copies are in the current stream.

        Args:
            entries: What lies where, in bytes from the begin of ``memory``. One that has ``strides`` (in elements) has
                its first element at ``start``. The same tuple again is found faster than an equal one.
            memory: uint8 ``[n]``, contiguous, on the model's device.
            beside_broadcast: The device receives the next bucket meanwhile, so copies should leave it room.

        Raises:
            ValueError: A tensor that does not lie within ``memory``, or askew to its dtype.
        """
        if not self._updates:
            self.begin()
        known_places = self._places.are_plain and self._state is not None
        if self.refusal or not known_places or memory.storage_offset() % _ALIGNMENT:
            self.plain += 1
            self._model.load_weights(views(entries, memory))
            return
        known = self._find(entries)
        if known is None:
            self._record(entries, memory)
        elif known.trusted:
            known.replay.run(memory, beside_broadcast=beside_broadcast)
            self.replayed += 1
        else:
            self._check(known, entries, memory, beside_broadcast=beside_broadcast)

    def replays(self, entries: Sequence[Entry]) -> bool:
        """Whether ``load`` of such a bucket only queues copies; else it may wait for the device."""
        known = self._find(entries)
        return known is not None and known.trusted

    def in_place(self, entries: Sequence[Entry], spans: Sequence[tuple[int, int]]) -> InPlace | None:
        """Which of these parts of a bucket of this layout, in their order, may be received where the model keeps them;
        None: none, yet or at all. Whoever receives them there does the rest with what is returned, instead of ``load``.
        Not before ``begin``."""
        known = self._find(entries)
        if known is None or not known.trusted:
            return None
        if self._contested is None:
            self._contested = contested(each.steps for each in self._known.values())
            for each in self._known.values():
                each.in_place = None
        if known.in_place is None or known.in_place.spans != spans:
            known.in_place = InPlace(known.steps, spans, self._contested, storages_of(self._model))
        if not known.in_place.places:
            return None
        self.placed += 1
        return known.in_place

    def end(self) -> None:
        """After an update's last bucket."""
        logger.debug(
            "update %d: %d buckets recorded, %d checked, %d replayed, %d received in place, %d loaded plainly so far",
            *(self._updates, self.recorded, self.checked, self.replayed, self.placed, self.plain),
        )

    def _find(self, entries: Sequence[Entry]) -> _Known | None:
        known = self._by_entries.get(id(entries))
        if known is None:
            known = self._known.get(_key(entries))
            if known is not None and isinstance(entries, tuple):
                self._by_entries.pop(id(known.entries), None)
                known.entries = entries
                self._by_entries[id(entries)] = known
        if known is not None:
            known.used = self._updates
        return known

    def _record(self, entries: Sequence[Entry], memory: torch.Tensor) -> None:
        storages, named = storages_of(self._model), views(entries, memory)
        with CopyRecorder(memory, storages.keys()) as recorder:
            self._model.load_weights(list(named))
        self.recorded += 1
        if recorder.refusal:
            self._refuse(logging.INFO, recorder.refusal)
        else:
            steps = tuple(recorder.steps)
            self._known[_key(entries)] = _Known(steps, Replay(arrange(steps), storages), self._updates)
            self._contested = None

    def _check(self, known: _Known, entries: Sequence[Entry], memory: torch.Tensor, *, beside_broadcast: bool) -> None:
        """Load, and find out whether a replay does the same."""
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        held, named = ModelMemory(self._model), views(entries, memory)
        held.flip()
        try:
            known.replay.run(memory, beside_broadcast=beside_broadcast)
            replayed = held.digest()
            with CopyRecorder(memory, storages_of(self._model).keys()) as again:
                self._model.load_weights(list(named))
            same = torch.equal(held.digest(), replayed)
        finally:
            held.flip()
        self._model.load_weights(list(named))
        self.checked += 1
        if same and not again.refusal and tuple(again.steps) == known.steps:
            known.trusted = True
        else:
            self._refuse(logging.WARNING, again.refusal or f"more than was recorded is done with {entries[0].name}")

    def _refuse(self, level: int, why: str) -> None:
        self.refusal = why
        self._known.clear()
        self._by_entries.clear()
        logger.log(level, "Weights of %s are loaded by its load_weights: %s", type(self._model).__name__, why)


def _key(entries: Sequence[Entry]) -> Key:
    return tuple((e.name, e.dtype, tuple(e.shape), e.start, getattr(e, "strides", None)) for e in entries)
