"""How the trainer's ranks find each other: one TCPStore, which rank 0 keeps for life, and groups below a prefix of it.

Rank 0 binds and listens before anybody is told the port, so nobody else can take it. Groups that are made anew after a
death begin with a prefix of their own (the epoch), and never meet keys of earlier ones.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from miles_agents.errors import EnvironmentFault
from miles_agents.node_info import ADDRESS_VARIABLE

CONNECT_S = 120.0
LOOPBACK = "127.0.0.1"


class NoRendezvous(EnvironmentFault):
    """The ranks of the trainer do not find each other."""

    code = "E-TRAIN-007"


class Rendezvous:
    """This rank's end of the store."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: TCPStore | None = None
        self._address = ("", 0)

    def listen(self) -> tuple[str, int]:
        """On rank 0: serve the store, where other nodes reach this one if there are any. A second call gives the same
        address.

        Raises:
            NoRendezvous: The address cannot be bound.
        """
        if self._store is None:
            host = os.environ.get(ADDRESS_VARIABLE) or LOOPBACK
            try:
                listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
                listener.bind((host, 0))
                listener.listen(1024)
            except OSError as error:
                raise NoRendezvous(
                    f"the trainer cannot listen on {host}",
                    evidence=str(error),
                    advice="Choose the cluster's network with --interface.",
                ) from error
            port = listener.getsockname()[1]
            self._store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=CONNECT_S),
                master_listen_fd=listener.detach(),
            )
            self._address = (host, port)
        return self._address

    def join(self, host: str, port: int, args: Any, *, epoch: int = 0) -> None:
        """Make the group of all ranks: gloo, and NCCL for what is on a GPU.

        Raises:
            NoRendezvous: Rank 0 or another rank did not come in time.
        """
        cuda = args.device == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        minutes = float(getattr(args, "distributed_timeout_minutes", None) or 10)
        try:
            if self._store is None:
                self._store = TCPStore(
                    host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S)
                )
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=PrefixStore(f"epoch-{epoch}", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=minutes),
            )
        except (dist.DistError, RuntimeError) as error:
            raise NoRendezvous(
                f"rank {self.rank} of {self.world_size} does not find the other ranks at {host}:{port}",
                evidence=str(error).partition("\n")[0],
                advice="Look at the logs of the other ranks; on several nodes, at the network between them.",
            ) from error

    def leave(self) -> None:
        """Give up the group and, on rank 0, the store."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None


def rank_device(kind: str, current: Callable[[], int] = torch.cuda.current_device) -> torch.device:
    """Of this rank, after ``Rendezvous.join``: a GPU always with its index, as NCCL keeps its communicators by it.

    A group that was connected for ``cuda`` would be connected again, with nobody on the other side, by the first
    broadcast of a tensor on ``cuda:0``.
    """
    return torch.device("cuda", current()) if kind == "cuda" else torch.device(kind)
