"""One update by stream on one rank of the trainer: who connects, until when, and what it ends with. Needs torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles.backends.sglang_utils.server_arguments import RECEIVE_WEIGHTS
from miles.backends.weight_update.engine_calls import TELL_S, EngineCalls
from miles.backends.weight_update.lines import Lines, Peer
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.order import order_payload
from miles.backends.weight_update.stream import Listener, Place

PATH = "/update_weights_from_tensor"
WHOLE_S = 86400.0
"""Of the request that lasts as long as the update."""
PATIENCE = 10
"""An engine waits so many times longer for the next word than it may take itself: meanwhile the trainer may be waiting
for others, one after the other. That the trainer has ended, or its host, is noticed at once, or in half a minute."""
_CONNECT_LOOK_S = 0.02


@dataclass(frozen=True)
class Roles:
    """What this rank has to do with engines.

    Attributes:
        speaks_to: It posts their request.
        expects: Ranks of engines that connect to it.
    """

    speaks_to: tuple[EngineTarget, ...] = ()
    expects: tuple[Peer, ...] = ()


def all_ranks(engines: Sequence[EngineTarget]) -> tuple[Peer, ...]:
    """Of all these engines."""
    return tuple((engine.name, rank) for engine in engines for rank in range(engine.tp_size))


class Stream:
    """An update that is under way. ``gathered``: a value from all ranks that have to do with engines, by rank.

    Attributes:
        connect_s: Seconds that ``connect`` has waited.
    """

    def __init__(
        self,
        update: WeightUpdate,
        listener: Listener,
        calls: EngineCalls,
        lines: Lines,
        gathered: Callable[[Any], list[Any]],
    ) -> None:
        self.calls = calls
        self.lines = lines
        self.host = listener.place.host
        self._gathered = gathered
        self._timeout_s = update.timeout_s
        self._began = time.perf_counter()
        self._listener = listener
        places = self._gathered(listener.place)
        # One request lasts as long as all buckets; how long each part may take is the lines' to say.
        self._requests = calls.start(PATH, lambda engine: _request(engine, places, update), timeout_s=WHOLE_S)
        self._connected = False
        self.connect_s = 0.0

    def connect(self) -> None:
        """Until every engine's ranks are there, or it has failed. All ranks call it at the same point."""
        began = time.monotonic()
        deadline = began + self._timeout_s
        while not self._connected:
            came = self._listener.accept(_CONNECT_LOOK_S if self.lines.missing() else 0.0)
            if came is not None:
                self.lines.take(*came)
                continue
            self._note_ended_requests()
            if time.monotonic() > deadline:
                for engine in self.lines.missing():
                    self.lines.fail(engine, f"it has not connected within {self._timeout_s:g} s")
            told = self._gathered((dict(self.lines.failures), bool(self.lines.missing())))
            for failures, _ in told:
                for engine, why in failures.items():
                    self.lines.fail(engine, why)
            self._connected = not any(missing for _, missing in told)
            self.connect_s = time.monotonic() - began

    def hang_up(self) -> None:
        """Let go of all lines, and of who has come too late. ``settle`` or ``end`` come next."""
        self.lines.close()
        self._listener.close()

    def end(self, *, at_once: bool = False) -> None:
        """After ``hang_up``: wait for the requests to be answered, as engines have nothing to wait for any more; with
        ``at_once`` they end without."""
        if at_once:
            self.calls.end_late(self._requests, self._requests.futures, 0.0)
        failed = self.lines.failures.keys() & self._requests.futures.keys()
        self.calls.end_late(self._requests, failed, min(TELL_S, self._timeout_s))
        self.calls.end_late(self._requests, self._requests.futures.keys() - failed, self._timeout_s)
        self.calls.finish(self._requests)

    def settle(self) -> None:
        """After ``hang_up``: all failures come to ``calls``, on all ranks, as only one rank's error is heard.

        Where every engine has said that it is done, its answer to the request says nothing more, and is not waited for:
        ``end`` does that when there is time.
        """
        failures = dict(self.lines.failures)
        if failures or not self.lines.are_done(self._requests.futures):
            self.end()
            failures = dict(self.lines.failures)
        self.calls.busy_s = self.calls.busy_s or time.perf_counter() - self._began
        for told in self._gathered(failures | {n: w for n, w in self.calls.failures.items() if n not in failures}):
            self.calls.failures |= told

    def _note_ended_requests(self) -> None:
        """An engine whose request is over before it has connected will not."""
        done = set(self._requests.done)
        for name in self.lines.missing() & done:
            error = self._requests.futures[name].exception()
            self.lines.fail(name, str(error) if error else "it answered without taking weights; its log says why")


def _request(engine: EngineTarget, places: Sequence[Place], update: WeightUpdate) -> dict[str, Any]:
    """``places`` by trainer rank: one for all, or that of the rank on the same GPU."""
    ranks = range(engine.tp_size)
    at = [places[0] if len(places) == 1 else places[engine.rank_offset - 1 + rank] for rank in ranks]
    within_s = PATIENCE * update.timeout_s
    payloads = [order_payload(at[rank], engine.name, rank, within_s, update.method) for rank in ranks]
    return {"load_format": RECEIVE_WEIGHTS, "flush_cache": False, "serialized_named_tensors": payloads}
