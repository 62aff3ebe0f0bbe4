"""How fast the store moves arrays between two workers of one node, against memcpy within one process.

python benchmarks/store.py [--rounds N]

A round, for each size and library: the producer puts an array, the reader gets it and sums it up, both drop it, and
the object is removed. Beside it, in the reader's own process, the same array is copied into memory that is used again,
and summed up. ``put / memcpy`` is what the store adds to the one copy, ``one way`` is put, get and sum together against
memcpy and sum. Medians; the first round of a size, with fresh memory, stands apart.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from miles_agents import Actor, Ref, endpoint, store
from miles_controller import Controller, ControllerConfig
from miles_launcher.local import LocalAgents

SIZES_MIB = (16, 64, 256)
LIBRARIES = ("numpy", "torch")
MIB = 1 << 20
HEADER = """\
             milliseconds, medians                             ratios               put+get  first round
         MiB       put       get       sum    memcpy       sum put/memcpy    one way    GiB/s  put+get, ms"""


def make(library: str, mib: int) -> Any:
    """An array or tensor of 64-bit floats."""
    if library == "numpy":
        import numpy as np

        return np.ones(mib * MIB // 8)
    import torch

    return torch.ones(mib * MIB // 8, dtype=torch.float64)


def seconds(work: Any) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


class Mover(Actor):
    """A producer or a reader."""

    def __init__(self) -> None:
        self.value: Any = None
        self.target: Any = None

    @endpoint
    def prepare(self, library: str, mib: int) -> None:
        """Make the array, and memory to copy it to."""
        self.value, self.target = make(library, mib), make(library, mib)

    @endpoint
    def put(self) -> tuple[float, Ref]:
        """Seconds, and the reference."""
        return seconds(lambda: store.put({"batch": [self.value]}))

    @endpoint
    def get(self, ref: Ref) -> tuple[float, float]:
        """Seconds of getting and of summing up."""
        got, value = seconds(lambda: store.get(ref)["batch"][0])
        summed, _ = seconds(value.sum)
        return got, summed

    @endpoint
    def remove(self, ref: Ref) -> None:
        """Everywhere."""
        store.remove(ref)

    @endpoint
    def memcpy(self) -> tuple[float, float]:
        """Seconds of copying within this process, and of summing up."""
        import numpy as np

        source, target = np.asarray(self.value), np.asarray(self.target)
        copied, _ = seconds(lambda: np.copyto(target, source))
        summed, _ = seconds(self.target.sum)
        return copied, summed


async def measure(producer: Any, reader: Any, library: str, mib: int, rounds: int) -> list[dict[str, float]]:
    """One dict of seconds per round; the first one is cold."""
    for worker in (producer, reader):
        await worker.prepare.call_one(library, mib)
    found = []
    for _ in range(rounds + 1):
        put, ref = await producer.put.call_one()
        got, summed = await reader.get.call_one(ref)
        await producer.remove.call_one(ref)
        copied, copied_summed = await reader.memcpy.call_one()
        found.append({"put": put, "get": got, "sum": summed, "memcpy": copied, "memcpy_sum": copied_summed})
    return found


def show(library: str, mib: int, found: list[dict[str, float]]) -> str:
    """One line."""
    cold, warm = found[0], {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
    one_way = warm["put"] + warm["get"] + warm["sum"]
    local = warm["memcpy"] + warm["memcpy_sum"]
    rate = mib / 1024 / (warm["put"] + warm["get"])
    times = " ".join(f"{warm[name] * 1e3:9.2f}" for name in ("put", "get", "sum", "memcpy", "memcpy_sum"))
    ratios = f"{warm['put'] / warm['memcpy']:10.2f} {one_way / local:10.2f}"
    return f"{library:6} {mib:5} {times} {ratios} {rate:8.1f} {(cold['put'] + cold['get']) * 1e3:12.1f}"


async def main(rounds: int) -> None:
    """The table."""
    node = "node-0"
    with tempfile.TemporaryDirectory(prefix="store-bench-") as directory:
        run_dir = Path(directory)
        agents: dict[str, Any] = {"run_dir": run_dir, "cpu_slots": 2, "store_bytes": 1 << 30}
        async with (
            Controller(ControllerConfig(run_dir=run_dir)) as controller,
            LocalAgents(controller, [node], **agents),
        ):
            await controller.wait_for_nodes(node)
            movers = await controller.spawn("movers", Mover, dims={"ranks": 2})
            both = (movers.slice(ranks=0), movers.slice(ranks=1))
            print(HEADER)
            for library in LIBRARIES:
                for mib in SIZES_MIB:
                    print(show(library, mib, await measure(*both, library, mib, rounds)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The store against memcpy.")
    parser.add_argument("--rounds", type=int, default=9)
    asyncio.run(main(parser.parse_args().rounds))
