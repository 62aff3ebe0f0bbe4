"""The process group of trainer (rank 0) and engines (ranks from 1) through which weights are broadcast.

The trainer holds a rendezvous store on a socket that is bound before anybody hears of its port. SGLang joins with its
``init_custom_process_group``: the keys below are prefixed as there, or the two sides would not find each other.
"""

from __future__ import annotations

import socket
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


class BroadcastGroup:
    """Made by ``join``; ``close`` it when the engines have changed."""

    def __init__(self, name: str, members: tuple[tuple[str, str], ...], backend: Any, store: TCPStore) -> None:
        self.name = name
        self.members = members
        self._backend = backend
        self._store = store

    @classmethod
    def join(cls, update: WeightUpdate, calls: EngineCalls, device: torch.device) -> BroadcastGroup:
        """Make the group with all engines of the update; those that are in an older one of its name leave that first.

        Raises:
            GroupNotMade: not everybody joined, with what the engines said.
        """
        kind = "nccl" if device.type == "cuda" else "gloo"
        host = address_towards(update.engines[0].url)
        size = 1 + sum(engine.tp_size for engine in update.engines)
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        store = TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        store.set_timeout(timedelta(seconds=JOIN_S))
        body = {"master_address": host, "master_port": port, "world_size": size}
        body |= {"group_name": update.group_name, "backend": kind}
        pending = calls.start("/init_weights_update_group", lambda engine: {**body, "rank_offset": engine.rank_offset})
        try:
            backend = _backend(update.group_name, store, size, host, device)
        except (RuntimeError, dist.DistError) as error:
            calls.finish(pending)
            raise _not_made(update, calls, str(error)) from error
        calls.finish(pending)
        if calls.failures:
            raise _not_made(update, calls, "")
        return cls(update.group_name, members_of(update), backend, store)

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """From here to all engines, without waiting: returns torch's work handle."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._backend.broadcast([tensor], options)

    def close(self) -> None:
        """Leave. Engines keep their side until they are told to leave, too."""
        if hasattr(self._backend, "abort"):
            self._backend.abort()
        del self._backend, self._store


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


def _backend(name: str, store: Store, size: int, host: str, device: torch.device) -> Any:
    # SGLang: PrefixStore(name), then torch's helper adds the name again and the device type.
    prefixed = PrefixStore(f"{name}/", PrefixStore(name, store))
    timeout = timedelta(seconds=BROADCAST_S)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(PrefixStore("cuda/", prefixed), 0, size, options)
        group.eager_connect_single_device(device)
        return group
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    return dist.ProcessGroupGloo(PrefixStore("cpu/", prefixed), 0, size, options)


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
