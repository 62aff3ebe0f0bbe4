"""The process group of trainer (rank 0) and engines (ranks from 1) through which weights are broadcast.

The trainer holds a rendezvous store on a socket that is bound before anybody hears of its port, and waits for the
others in a thread. Engines come to it through ``join_as_engine``, or, where SGLang is asked by its own requests, with
its ``init_custom_process_group``: that one prefixes keys, and both sides have to do it alike.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from miles.backends.weight_update.stream import address_towards

JOIN_S = 120.0
BROADCAST_S = 1800.0
_LEAVE_S = 10.0
_SURVIVES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""torch would end this process a minute after NCCL has found that another one is gone (by network): here the group is
left instead, and the update fails for those who were the cause."""
_LOOK_S = 0.002


class BroadcastGroup:
    """One side of a group that stands. ``close`` it when the members have changed.

    Attributes:
        name: Differs from group to group.
    """

    def __init__(self, name: str, backend: Any, store: TCPStore) -> None:
        self.name = name
        self._backend = backend
        self._store = store

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """From the trainer's rank to all others, without waiting: returns torch's work handle."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._backend.broadcast([tensor], options)

    def close(self) -> None:
        """Leave, without waiting for long: a broadcast that somebody did not take part in may be under way.

        Others keep their side until they leave, too; once they have, such a broadcast ends.
        """
        ending = threading.Thread(target=_let_go, args=(self._backend, self._store), name="end-group", daemon=True)
        del self._backend, self._store
        ending.start()
        ending.join(_LEAVE_S)


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

    def __init__(self, host: str, size: int, device: torch.device, *, prefixed: str = "") -> None:
        self.name = secrets.token_hex(8)
        self.host = host
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = int(listener.getsockname()[1])
        self._server = TCPStore(
            host, self.port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._joining = _Joining(
            prefixed_as_sglang(TCPStore(host, self.port, size, False), prefixed), size, host, device
        )

    def wait(self, is_hopeless: Callable[[], bool]) -> BroadcastGroup | str:
        """Until all are there; else why not. What the others say is the caller's to ask."""
        deadline = time.monotonic() + JOIN_S
        while not self._joining.done.wait(_LOOK_S) and not is_hopeless() and time.monotonic() < deadline:
            pass
        backend = self._joining.backend
        if backend is None or self._joining.error or not self._joining.done.is_set():
            del self._server  # whoever still waits in the rendezvous gives up now
            self._joining.give_up()
            return self._joining.error or f"not everybody came within {JOIN_S:g} s"
        return BroadcastGroup(self.name, backend, self._server)


def join_as_engine(name: str, at: tuple[str, int], place: tuple[int, int], device: torch.device) -> BroadcastGroup:
    """An engine's side: blocks until all are there. ``at``: the trainer's host and port; ``place``: this rank, of how
    many. Raises RuntimeError."""
    store = TCPStore(*at, place[1], False, timeout=timedelta(seconds=JOIN_S))
    backend = _make_backend(store, place, address_towards(*at), device)
    _connect(backend, device)
    return BroadcastGroup(name, backend, store)


def _let_go(backend: Any, store: TCPStore) -> None:
    if backend.name() == "nccl":
        backend.abort()
    # The last references: their ends wait for what is under way, at the longest until its deadline.
    del backend, store


class _Joining:
    """The trainer's own side of the rendezvous, in a thread: it blocks until all are there."""

    def __init__(self, store: Store, size: int, host: str, device: torch.device) -> None:
        self._arguments = (store, (0, size), host, device)
        self._device = device
        self.backend: Any = None
        self.error = ""
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="join-group", daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """It failed elsewhere. Waits a little for the thread, which ends as the store does."""
        if self._device.type == "cuda" and self.backend is not None:
            self.backend.abort()
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        try:
            self.backend = _make_backend(*self._arguments)
            _connect(self.backend, self._device)
        except (RuntimeError, dist.DistError) as error:
            self.error = str(error)
        self.done.set()


def prefixed_as_sglang(store: Store, name: str) -> Store:
    """SGLang's helper prefixes the group's name, and torch's then does so again. Without a name: as it is."""
    return PrefixStore(f"{name}/", PrefixStore(name, store)) if name else store


def _make_backend(store: Store, place: tuple[int, int], host: str, device: torch.device) -> Any:
    timeout = timedelta(seconds=BROADCAST_S)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
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


def _connect(backend: Any, device: torch.device) -> None:
    if device.type == "cuda":
        backend.eager_connect_single_device(device)
