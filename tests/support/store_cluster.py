"""What tests with real agents ask of a store: its numbers, and its memory in the processes of this test session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from support.cluster import DEADLINE_S, Cluster
from support.leaks import MARK
from support.store_actors import Keeper

MIB = 1 << 20


async def keepers(cluster: Cluster, hosts: int) -> list[list[Any]]:
    """Two workers on each of the nodes, by node."""
    mesh = await cluster.controller.spawn("keepers", Keeper, dims={"hosts": hosts, "gpus": 2})
    return [[mesh.slice(hosts=host, gpus=gpu) for gpu in range(2)] for host in range(hosts)]


async def store_of(cluster: Cluster, node: str = "node-0") -> dict[str, Any]:
    """The store's part of the agent's status."""
    fabric = cluster.controller.fabric
    found = fabric.find(node)
    assert found is not None, f"{node} is not there"
    status = await fabric.agent(found).options(timeout_s=DEADLINE_S).endpoint("status").call_one()
    return dict(status["store"])


async def until_store(
    cluster: Cluster, holds: Callable[[dict[str, Any]], bool], node: str = "node-0"
) -> dict[str, Any]:
    """Ask until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds(found := await store_of(cluster, node)):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)
    return found


def segments_anywhere() -> list[str]:
    """Descriptors and mappings of segments in the processes of this test session that still have memory."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for pid in psutil.pids():
        try:
            if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                continue
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                if "memfd:miles-store" in (target := os.readlink(path)):
                    found.append(f"pid {pid}: {target} {os.stat(path).st_blocks} blocks")
            maps = Path(f"/proc/{pid}/maps").read_text()
            found += [f"pid {pid}: mapping" for line in maps.splitlines() if "memfd:miles-store" in line]
        except OSError:
            continue
    return found
