"""SGLang's side of a weight update by stream: connects to the trainer, takes bucket after bucket, loads them.

SGLang calls ``load`` as one of its ``custom_weight_loader`` functions, in each rank's scheduler, once per update. What
it is given says where the trainer listens (``weight_update.stream`` describes what the two say to each other):

* memory that is shared (colocated): a bucket is loaded when its message comes, and its memory is the trainer's again
  when this side has said so; memory that stays as it is until the end is read without waiting for the device;
* a process group: the next bucket is received while the one before is loaded, and nobody waits for the host; what is
  known to be copied in one piece is received where it goes. The group stays until a trainer asks for another.

Whatever goes wrong is told to the trainer and logged; it never ends the engine, which the controller fences, or gives
these weights again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from miles.backends.sglang_utils.load_plan import LoadPlans
from miles.backends.sglang_utils.replay_copies import InPlace
from miles.backends.sglang_utils.shared_sources import SharedSources
from miles.backends.weight_update.broadcast_bucket import Cut, incoming_parts, spans_alone
from miles.backends.weight_update.broadcast_group import BroadcastGroup, join_as_engine
from miles.backends.weight_update.buckets import Entry
from miles.backends.weight_update.stream import Line, Place, StreamBroken, connect

logger = logging.getLogger("miles.receive_weights")

_LOOK_EVERY_S = 0.0002
_KEPT_AS = "weight_receiver"
"""Attribute of the model that keeps its receiver: it goes when the model does."""


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """One update; the order is the name of the one (empty) tensor."""
    order = json.loads(named_tensors[0][0])
    receiver = getattr(model, _KEPT_AS, None)
    if receiver is None:
        receiver = Receiver(model)
        setattr(model, _KEPT_AS, receiver)
    hello = {"engine": order["engine"], "rank": order["rank"], "group": receiver.group_name}
    try:
        with contextlib.closing(connect(Place(*order["place"]), hello, order["timeout_s"])) as line:
            receiver.serve(line, order["method"])
    except StreamBroken as error:
        logger.warning("weights were not received: %s", error)


def forget(model: Any) -> None:
    """Let go of what is kept for a model: it will not be given weights any more."""
    receiver = getattr(model, _KEPT_AS, None)
    if receiver is not None:
        receiver.leave_group()
        delattr(model, _KEPT_AS)


class Receiver:
    """Of one model in one process: what stays from update to update."""

    def __init__(self, model: Any) -> None:
        self._plans = LoadPlans(model)
        self._has_begun = False
        self._group: BroadcastGroup | None = None
        self._device = device_of(model)

    @property
    def group_name(self) -> str:
        """Of the process group that this rank is in; empty: none."""
        return self._group.name if self._group is not None else ""

    def serve(self, line: Line, method: str) -> None:
        """One update by this ``UpdateMethod``, to its end.

        Raises:
            StreamBroken: the trainer is gone, or has heard what went wrong here.
        """
        try:
            self._has_begun = False
            if method != "broadcast":  # else the first bucket is to be on its way meanwhile
                self._begin()
            with contextlib.closing(SharedSources()) as sources:
                self._take_all(line, sources)
            self._plans.end()
            line.send({"said": "done"})
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            traceback.clear_frames(error.__traceback__)  # they hold broadcasts, and so the group's connections
            try:
                self._tell(line, error, text)
            finally:
                self.leave_group()  # a broadcast may be under way that never ends
            raise

    @staticmethod
    def _tell(line: Line, error: BaseException, text: str) -> None:
        """Raises StreamBroken in place of what would end SGLang's scheduler."""
        if isinstance(error, _CutOff):
            line.send({"said": "cut off", "why": str(error)})
            raise StreamBroken(f"a broadcast did not arrive: {error}") from None
        if isinstance(error, Exception) and not isinstance(error, StreamBroken):
            logger.error("weights were not loaded: %s", text)
            line.send({"error": f"{type(error).__name__}: {error}"})
            raise StreamBroken(str(error)) from None

    def _take_all(self, line: Line, sources: SharedSources) -> None:
        arriving: _Arriving | None = None
        not_waited_for = -1
        buffers = [torch.empty(0, dtype=torch.uint8, device=self._device) for _ in range(2)]
        while True:
            message = line.receive()
            match message["say"]:
                case "join":
                    self._join(line, message)
                case "bucket":
                    entries = tuple(Entry.of_plain(values) for values in message["entries"])
                    if "memory" in message:
                        self._load_shared(line, message, entries, sources)
                        not_waited_for = message["number"] if message.get("stays") else -1
                        continue
                    if arriving is not None and not self._plans.replays(arriving.entries):
                        # It may wait for all of the device, and so for the next broadcast, which may never end.
                        self._load_arrived(line, arriving)
                        arriving = None
                    coming = self._receive(message, entries, buffers)
                    self._begin()
                    self._load_arrived(line, arriving, beside_broadcast=True)
                    arriving = coming
                case "end":
                    self._load_arrived(line, arriving)
                    self._settle(line, arriving)
                    if not_waited_for >= 0:
                        self._tell_loaded(line, not_waited_for, time.perf_counter())
                    return
                case other:
                    raise StreamBroken(f"the trainer said {other!r}, which is unknown here")

    def _load_shared(
        self, line: Line, message: dict[str, Any], entries: tuple[Entry, ...], sources: SharedSources
    ) -> None:
        """Memory that stays until the update is over is waited for in the end, once."""
        self._begin()
        start = time.perf_counter()
        self._plans.load(entries, sources.bytes_of(message["memory"]))
        self._tell_loaded(line, message["number"], start, wait=not message.get("stays"))

    def _begin(self) -> None:
        if not self._has_begun:
            self._plans.begin()
            self._has_begun = True

    def _tell_loaded(self, line: Line, number: int, start: float, *, wait: bool = True) -> None:
        if wait and self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        line.send({"said": "loaded", "number": number, "seconds": time.perf_counter() - start})

    def _join(self, line: Line, message: dict[str, Any]) -> None:
        self.leave_group()
        at, place = (message["host"], message["port"]), (message["rank"], message["size"])
        self._group = join_as_engine(message["name"], at, place, self._device, line.is_over)
        line.send({"said": "joined"})

    def _receive(self, message: dict[str, Any], entries: tuple[Entry, ...], buffers: list[torch.Tensor]) -> _Arriving:
        """Large tensors to where the model keeps them, if that is known. An update's first bucket is received before it
        has been looked whether what is known still holds, as that takes as long as a bucket."""
        if self._group is None:
            raise RuntimeError("this engine is in no process group")
        packed = message["packed"]
        spans = spans_alone(entries, packed, Cut(*message["cut"]))
        in_place = self._plans.in_place(entries, spans) if self._has_begun else None
        places = {} if in_place is None else in_place.places
        is_whole = len(places) < len(spans)
        size, room = (message["num_bytes"], message["room"]) if is_whole else (packed, packed)
        buffers.reverse()
        if buffers[0].numel() < size:
            buffers[0] = torch.empty(room, dtype=torch.uint8, device=self._device)
        memory = buffers[0][:size]
        work = self._group.broadcast(incoming_parts(packed, spans, memory, places))
        return _Arriving(message["number"], entries, memory, work, in_place)

    def _load_arrived(self, line: Line, arriving: _Arriving | None, *, beside_broadcast: bool = False) -> None:
        """On a GPU a replay is waited for by nobody: it comes after the broadcast on the device. Anything else may wait
        for the device itself, which would never end where the broadcast does not."""
        if arriving is None:
            return
        in_place = arriving.in_place
        is_queued = in_place is not None or self._plans.replays(arriving.entries)
        if self._device.type != "cuda" or not is_queued:
            self._watch(line, arriving.work)
        start = time.perf_counter()
        self._await(arriving.work)
        if in_place is not None:
            in_place.load_rest(arriving.memory, beside_broadcast=beside_broadcast)
        else:
            self._plans.load(arriving.entries, arriving.memory, beside_broadcast=beside_broadcast)
        self._tell_loaded(line, arriving.number, start, wait=False)

    def _settle(self, line: Line, last: _Arriving | None) -> None:
        if last is not None and self._device.type == "cuda":
            self._watch(line, last.work)
            self._await(last.work)  # it also counts as completed if it has failed
            torch.cuda.current_stream().synchronize()

    @staticmethod
    def _await(work: Any) -> None:
        """On a CPU until a broadcast is over; on a GPU, what comes next comes after it. Raises _CutOff: it failed."""
        try:
            work.wait()
        except RuntimeError as error:
            raise _CutOff(str(error)) from None

    def _watch(self, line: Line, work: Any) -> None:
        """Until a broadcast is over. Raises StreamBroken: the trainer is gone, so it never will be."""
        while not work.is_completed():
            if line.is_over():
                raise StreamBroken("the trainer has ended a broadcast")
            time.sleep(_LOOK_EVERY_S)

    def leave_group(self) -> None:
        """Broadcasts that are under way end for everybody."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


class _CutOff(Exception):
    """A broadcast did not arrive: somebody else, who had to hand it on, is gone."""


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A bucket whose broadcast is under way. ``in_place``: what does not come into ``memory``."""

    number: int
    entries: tuple[Entry, ...]
    memory: torch.Tensor
    work: Any
    in_place: InPlace | None


def device_of(model: Any) -> torch.device:
    """Where the model's parameters are."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if parameters is not None else None
    return torch.device("cpu") if first is None else first.device
