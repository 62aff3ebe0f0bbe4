"""The process group of trainer (rank 0) and engines (ranks from 1) through which weights are broadcast.

The trainer holds a rendezvous store on a socket that is bound before anybody hears of its port. SGLang joins with its
``init_custom_process_group``: the keys below are prefixed as there, or the two sides would not find each other.
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.parse
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from miles.backends.weight_update.engine_calls import EngineCalls
from miles.backends.weight_update.failures import GroupNotMade
from miles.backends.weight_update.messages import WeightUpdate

JOIN_S = 120.0
BROADCAST_S = 1800.0
_LEAVE_S = 10.0
_LOOK_S = 0.01


class BroadcastGroup:
    """Made by ``join``; ``close`` it when the engines have changed."""

    def __init__(self, name: str, members: tuple[tuple[str, str], ...], backend: Any, store: TCPStore) -> None:
        self.name = name
        self.members = members
        self._backend = backend
        self._store = store

    @classmethod
    def join(cls, update: WeightUpdate, calls: EngineCalls, device: torch.device) -> BroadcastGroup:
        """Make the group with all engines of the update, which must not be in one of this name.

        Raises:
            GroupNotMade: not everybody joined in time, with what the engines said.
        """
        host = address_towards(update.engines[0].url)
        size = 1 + sum(engine.tp_size for engine in update.engines)
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        server = TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        body = {"master_address": host, "master_port": port, "world_size": size}
        body |= {"group_name": update.group_name, "backend": "nccl" if device.type == "cuda" else "gloo"}
        pending = calls.start("/init_weights_update_group", lambda engine: {**body, "rank_offset": engine.rank_offset})
        joining = _Joining(update.group_name, TCPStore(host, port, size, False), size, host, device)
        deadline = time.monotonic() + JOIN_S
        while not joining.done.wait(_LOOK_S) and not pending.has_failed and time.monotonic() < deadline:
            pass
        if joining.backend is None or not joining.done.is_set():
            del server  # whoever still waits in the rendezvous gives up now
            joining.give_up()
            calls.finish(pending)
            raise _not_made(update, calls, joining.error or f"not everybody came within {JOIN_S:g} s")
        calls.finish(pending)
        if calls.failures:
            _let_go(joining.backend, server)
            raise _not_made(update, calls, "")
        return cls(update.group_name, members_of(update), joining.backend, server)

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """From here to all engines, without waiting: returns torch's work handle."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._backend.broadcast([tensor], options)

    def close(self) -> None:
        """Leave, without waiting for long: a broadcast that somebody did not take part in may be under way.

        Engines keep their side until they are told to leave, too; once they have, such a broadcast ends.
        """
        ending = threading.Thread(target=_let_go, args=(self._backend, self._store), name="end-group", daemon=True)
        del self._backend, self._store
        ending.start()
        ending.join(_LEAVE_S)


def _let_go(backend: Any, store: TCPStore) -> None:
    if backend.name() == "nccl":
        backend.abort()
    # The last references: their ends wait for what is under way, at the longest until its deadline.
    del backend, store


def members_of(update: WeightUpdate) -> tuple[tuple[str, str], ...]:
    """Who is in a group, apart from the trainer."""
    return tuple((engine.name, engine.url) for engine in update.engines)


def address_towards(url: str) -> str:
    """This host's address as the host of ``url`` sees it."""
    parts = urllib.parse.urlsplit(url)
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


class _Joining:
    """The trainer's own side of the rendezvous, in a thread: it blocks until all are there."""

    def __init__(self, name: str, store: Store, size: int, host: str, device: torch.device) -> None:
        # SGLang: PrefixStore(name), then torch's helper adds the name again, and the device type.
        self._store = PrefixStore(f"{name}/", PrefixStore(name, store))
        self._size = size
        self._host = host
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
            self._make()
        except (RuntimeError, dist.DistError) as error:
            self.error = str(error)
        self.done.set()

    def _make(self) -> None:
        timeout = timedelta(seconds=BROADCAST_S)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.backend = dist.ProcessGroupNCCL(PrefixStore("cuda/", self._store), 0, self._size, options)
            self.backend.eager_connect_single_device(self._device)
            return
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host, lazy_init=False)]
        self.backend = dist.ProcessGroupGloo(PrefixStore("cpu/", self._store), 0, self._size, options)


def _not_made(update: WeightUpdate, calls: EngineCalls, why: str) -> GroupNotMade:
    names = ", ".join(engine.name for engine in update.engines)
    said = [f"{name}: {text}" for name, text in calls.failures.items()]
    return GroupNotMade(
        f"no process group of the trainer and {names} came about",
        evidence="\n".join([*([f"trainer: {why}"] if why else []), *said]) or "no reason was given",
        advice="Read the logs of the engines; a firewall between the nodes, or an interface that the other side cannot "
        "reach (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), is the usual cause.",
        engines=[engine.name for engine in update.engines],
    )
