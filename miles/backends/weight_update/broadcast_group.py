"""The process group of trainer (rank 0) and engines (ranks from 1) through which weights are broadcast.

The trainer holds a rendezvous store on a socket that is bound before anybody hears of its port, and waits for the
others in a thread. Engines come to it through ``join_as_engine``, or, where SGLang is asked by its own requests, with
its ``init_custom_process_group``: that one prefixes keys, and both sides have to do it alike. It also leaves NCCL's
communicator to the first broadcast, so the trainer must not wait for it before it has asked for one (``connect``).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from miles.backends.weight_update.in_thread import InThread
from miles.backends.weight_update.stream import address_towards

JOIN_S = 120.0
BROADCAST_S = 1800.0
_LEAVE_S = 10.0
_SURVIVES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""torch would end this process a minute after NCCL has found that another one is gone (by network): here the group is
left instead, and the update fails for those who were the cause."""
_FIND_S = 2.0
MakeBackend = Callable[[Store, tuple[int, int], str, torch.device], Any]


class BroadcastGroup:
    """One side of a group that stands. ``close`` it when the members have changed.

    Args:
        unconnected: The device for which ``connect`` is still to come.

    Attributes:
        name: Differs from group to group.
    """

    def __init__(self, name: str, backend: Any, store: TCPStore, unconnected: torch.device | None = None) -> None:
        self.name = name
        self._backend = backend
        self._store = store
        self._unconnected = unconnected

    def connect(self, is_hopeless: Callable[[], bool], within_s: float) -> str:
        """Where that is still to be done, once the others are on their way into their first broadcast: it blocks until
        they are. Returns why it failed; the group can only be closed then."""
        device, self._unconnected = self._unconnected, None
        return "" if device is None else _connected(self._backend, device, is_hopeless, within_s)

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> Any:
        """One or more from the trainer's rank to all others, without waiting: returns what can be asked as torch's work
        handles can. NCCL sends them as one."""
        if len(tensors) > 1 and self._backend.supports_coalescing:
            return self._together(tensors)
        works = [self._one(tensor) for tensor in tensors]
        return works[0] if len(works) == 1 else _Works(works)

    def _one(self, tensor: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._backend.broadcast([tensor], options)

    def _together(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Only torch's groups know how; what is begun has to be ended, as it holds up all of this thread's NCCL."""
        device = tensors[0].device
        if not all(tensor.device == device and tensor.is_contiguous() for tensor in tensors):
            raise ValueError("tensors to broadcast together lie in one piece each, on one device")
        group = dist.ProcessGroup(self._store, self._backend.rank(), self._backend.size())
        group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, self._backend)
        group._start_coalescing(device)
        try:
            for tensor in tensors:
                self._one(tensor)
        finally:
            work = group._end_coalescing(device)
        return work

    def close(self) -> None:
        """Leave, without waiting for long: a broadcast that somebody did not take part in may be under way.

        Others keep their side until they leave, too; once they have, such a broadcast ends.
        """
        held = [self._backend, self._store]
        del self._backend, self._store
        _leave(held)


class _Works:
    """Several broadcasts that are under way, as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def is_completed(self) -> bool:
        """All of them."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """For all of them. Raises RuntimeError: one has failed."""
        for work in self._works:
            work.wait()


def has_arrived(work: Any) -> bool:
    """Whether a broadcast that is over went well. On a GPU also of one that is not over: what the current stream does
    next comes after it. NCCL's works know no ``is_success``, and count as completed when they have failed.
    """
    try:
        work.wait()
    except RuntimeError:
        return False
    return True


class Gathering:
    """A group on its way, at the trainer: others may come to ``host`` and ``port``."""

    def __init__(
        self, host: str, size: int, device: torch.device, *, prefixed: str = "", make_backend: MakeBackend | None = None
    ) -> None:
        if device.type == "cuda" and device.index is None:
            raise ValueError("NCCL keeps a communicator for each index: a group needs a device with one")
        self.name = secrets.token_hex(8)
        self.host = host
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = int(listener.getsockname()[1])
        self._server = TCPStore(
            host, self.port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._unconnected = device if prefixed and device.type == "cuda" else None
        self._backend: Any = None
        self._make = partial(
            make_backend or _make_backend,
            prefixed_as_sglang(TCPStore(host, self.port, size, False), prefixed), (0, size), host, device,
        )  # fmt: skip
        self._device = device
        self._is_given_up = False
        self._joining = InThread(self._join, "join-group")  # it blocks until all are there

    def wait(self, is_hopeless: Callable[[], bool]) -> BroadcastGroup | str:
        """Until all are there; else why not. What the others say is the caller's to ask."""
        why = self._joining.wait(is_hopeless, JOIN_S)
        if not why:
            backend, self._backend = self._backend, None  # nothing else may keep its connections
            return BroadcastGroup(self.name, backend, self._server, self._unconnected)
        self._is_given_up = True
        del self._server  # whoever still waits in the rendezvous gives up now
        if self._device.type == "cuda" and self._backend is not None:
            held, self._backend = [self._backend], None
            _leave(held)
        elif self._device.type == "cpu":
            self._joining.let_end(_LEAVE_S)
        return why

    def _join(self) -> None:
        self._backend = self._make()
        if self._unconnected is None and not self._is_given_up:
            _connect(self._backend, self._device)


def join_as_engine(
    name: str,
    at: tuple[str, int],
    place: tuple[int, int],
    device: torch.device,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> BroadcastGroup:
    """An engine's side: blocks until all are there. ``at``: the trainer's host and port; ``place``: this rank, of how
    many; ``is_hopeless``: the trainer is gone, or has given up. Raises RuntimeError."""
    held: list[Any] = []
    is_given_up = threading.Event()

    def join() -> None:
        store = _found(at, place[1], is_given_up)
        held[:] = [_make_backend(store, place, address_towards(*at), device), store]
        del store
        if not is_given_up.is_set():
            _connect(held[0], device)

    if why := InThread(join, "join-group").wait(is_hopeless, JOIN_S):
        is_given_up.set()
        if held:
            _leave(held)
        raise RuntimeError(why)
    group = BroadcastGroup(name, *held)
    held.clear()  # nothing else may keep its connections
    return group


def _found(at: tuple[str, int], size: int, is_given_up: threading.Event) -> TCPStore:
    """The trainer's store. torch looks for one that is gone for as long as its timeout, several times over, so it is
    asked to look for a little, again and again; one that takes connections and says nothing keeps it longer. Raises
    RuntimeError."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            store = TCPStore(*at, size, False, timeout=timedelta(seconds=_FIND_S))
        except dist.DistNetworkError:
            if is_given_up.is_set() or time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(timedelta(seconds=JOIN_S))
            return store


def _leave(held: list[Any]) -> None:
    """Let go of a backend, and of its store after it, in a thread which is waited for a little: nothing bounds how long
    a backend takes to end. ``held`` has the last references to them, and is emptied there."""
    ending = threading.Thread(target=_let_go, args=(held,), name="end-group", daemon=True)
    ending.start()
    ending.join(_LEAVE_S)


def _let_go(held: list[Any]) -> None:
    if held[0].name() == "nccl":
        held[0].abort()
    while held:  # their ends wait for what is under way, at the longest until its deadline
        held.pop(0)


def prefixed_as_sglang(store: Store, name: str) -> Store:
    """SGLang's helper prefixes the group's name, and torch's then does so again. Without a name: as it is."""
    return PrefixStore(f"{name}/", PrefixStore(name, store)) if name else store


def _make_backend(store: Store, place: tuple[int, int], host: str, device: torch.device) -> Any:
    timeout = timedelta(seconds=BROADCAST_S)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        nccl.is_high_priority_stream = True  # copies that go on beside it would keep it waiting for a place on the GPU
        with variables_set(_SURVIVES):
            return dist.ProcessGroupNCCL(PrefixStore("cuda/", store), *place, nccl)
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._timeout = timeout
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    return dist.ProcessGroupGloo(PrefixStore("cpu/", store), *place, gloo)


@contextlib.contextmanager
def variables_set(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, for as long as something reads them."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _connected(backend: Any, device: torch.device, is_hopeless: Callable[[], bool], within_s: float) -> str:
    """Make NCCL's communicator, which blocks until all others do. Returns why it came to nothing: the thread that waits
    for them then stays until they come or go, as NCCL's call knows no end, and ``abort`` not a call that has not
    returned."""
    return InThread(partial(_connect, backend, device), "connect-group").wait(is_hopeless, within_s)


def _connect(backend: Any, device: torch.device) -> None:
    if device.type == "cuda":
        backend.eager_connect_single_device(device)
