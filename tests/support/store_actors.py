"""Actors that use the store as a test says. Loaded in workers as ``support.store_actors``."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from miles_agents import Actor, endpoint, store
from miles_agents.store import client
from miles_agents.store.ref import Ref


class Keeper(Actor):
    """Puts, gets and keeps."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []

    @endpoint(thread="io")
    def pid(self) -> int:
        """Answers while the main thread waits."""
        return os.getpid()

    @endpoint
    def put(self, value: Any, copies: int = 1, timeout_s: float = 20.0) -> Ref:
        """What came, into the store."""
        return store.put(value, copies=copies, timeout_s=timeout_s)

    @endpoint
    def put_zeros(self, nbytes: int, fill: int = 0, timeout_s: float = 20.0, copies: int = 1) -> Ref:
        """That many bytes of one value, made here."""
        return store.put(bytearray([fill]) * nbytes, timeout_s=timeout_s, copies=copies)

    @endpoint
    async def remove_left(self, kept: list[Ref]) -> int:
        """What earlier lives of this actor put here."""
        return await store.remove_left_async(kept)

    @endpoint
    def put_parts(self, values: list[Any]) -> list[Ref]:
        """All of them in one segment."""
        return store.put_parts(values)

    @endpoint
    def get(self, ref: Ref, timeout_s: float = 20.0) -> Any:
        """The value (small: it travels back in the answer)."""
        return store.get(ref, timeout_s=timeout_s)

    @endpoint
    def summary(self, ref: Ref, timeout_s: float = 20.0) -> list[int]:
        """Length, first and last byte of a large bytearray."""
        value = store.get(ref, timeout_s=timeout_s)
        return [len(value), value[0], value[-1]]

    @endpoint
    def keep(self, name: str, ref: Ref) -> int:
        """Get an object and hold on to it; returns the sum of its array."""
        self.kept[name] = store.get(ref)
        return int(self.kept[name].sum())

    @endpoint
    def put_array(self, count: int, fill: int, copies: int = 1, timeout_s: float = 20.0) -> Ref:
        """An array of 64-bit integers."""
        import numpy as np

        return store.put(np.full(count, fill, np.int64), copies=copies, timeout_s=timeout_s)

    @endpoint
    def change_kept(self, name: str, fill: int) -> int:
        """Write over all that is kept under a name; returns its sum."""
        self.kept[name][:] = fill
        return int(self.kept[name].sum())

    @endpoint
    def sum_kept(self, name: str) -> int:
        """Of the array that is kept."""
        return int(self.kept[name].sum())

    @endpoint
    def let_go(self, name: str) -> None:
        """Drop it."""
        del self.kept[name]
        gc.collect()

    @endpoint
    def remove(self, ref: Ref) -> None:
        """Everywhere."""
        store.remove(ref)

    @endpoint
    async def on_loop(self, value: Any) -> Any:
        """The async verbs, on the async thread; and the refusal of a waiting one there."""
        try:
            store.put(value)
        except Exception as error:
            refusal = str(error)
        ref = await store.put_async(value)
        again = await store.get_async(ref)
        await store.remove_async(ref)
        return [again, refusal]

    @endpoint
    async def cancel_a_put(self, nbytes: int) -> None:
        """A put that waits for room, given up."""
        task = asyncio.create_task(store.put_async(bytes(nbytes)))
        while not task.done():
            await asyncio.sleep(0.2)
            task.cancel()

    @endpoint
    def many(self, count: int, nbytes: int) -> list[list[int]]:
        """So many objects put, got and removed at once, on eight threads."""

        def one(number: int) -> list[int]:
            ref = store.put({"n": number, "data": bytearray([number % 256]) * nbytes})
            value = store.get(ref)
            store.remove(ref)
            return [value["n"], len(value["data"]), value["data"][-1]]

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(count)))

    @endpoint
    def allocate_only(self, nbytes: int, sign: str) -> None:
        """A segment, half written, never committed; then wait to be killed."""
        from miles_agents.rpc.context import current_actor

        place = current_actor().store
        assert place is not None
        connection = client.Connection(*place, 1)
        (_, capacity), fd = connection.ask(["alloc", nbytes, 20.0], 20.0)
        assert fd is not None
        mapping = client.Mapping(fd, capacity, private=False)
        client.copy_bytes(mapping.address, b"x" * (nbytes // 2))
        Path(sign).touch()
        threading.Event().wait()

    @endpoint
    def odd_arrays(self) -> list[bool]:
        """Arrays and tensors that do not lie in order, made here."""
        import numpy as np
        import torch

        base = np.arange(60_000).reshape(200, 300)
        grid = torch.arange(60_000, dtype=torch.bfloat16).reshape(200, 300)
        odd = [base.T, base[::2, 3:], base[::-1], grid.t(), grid[:, ::3], grid.expand(2, 200, 300)]
        ref = store.put({"odd": odd})
        found = store.get(ref)["odd"]
        store.remove(ref)
        return [bool((one == other).all()) and one.shape == other.shape for one, other in zip(odd, found, strict=True)]

    @endpoint
    def put_untransportable(self) -> Ref:
        """A lock, deep inside."""
        return store.put({"deep": [0, threading.Lock()]})

    @endpoint
    def greet_with(self, token: str) -> None:
        """Dial the store with a token of somebody else's."""
        from miles_agents.rpc.context import current_actor

        place = current_actor().store
        assert place is not None
        client.Connection(place[0], token, 1)

    @endpoint
    def hang_in_get(self, ref: Ref) -> None:
        """Get and drop the same object for ever."""
        while store.get(ref) is not None:
            pass

    @endpoint
    def order_agent(self, order: str, *args: Any) -> Any:
        """What only agents may."""
        from miles_agents import current_actor

        agent = current_actor().agent
        assert agent is not None
        return agent.endpoint(order).call_one(*args).get()

    @endpoint
    def sum_in_child(self, ref: Ref) -> list[int]:
        """Of an array that a forked process gets, and changes; then of what this one has."""
        self.kept["forked"] = store.get(ref)
        pid = os.fork()
        if not pid:
            try:
                mine = store.get(ref)
                mine[:] += 1
                self.kept.clear()
                gc.collect()
                os._exit(int(mine.sum()) % 256)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(255)
        _, status = os.waitpid(pid, 0)
        return [os.waitstatus_to_exitcode(status), int(self.kept["forked"].sum())]

    @endpoint
    def ask_raw(self, question: list[Any]) -> list[Any]:
        """Anything, to the agent."""
        from miles_agents.rpc.context import current_actor

        place = current_actor().store
        assert place is not None
        connection = client.Connection(*place, 1)
        try:
            return connection.ask(question, 5.0)[0]
        finally:
            connection.close()

    @endpoint
    def start_getting(self, ref: Ref, sign: str) -> None:
        """Get on another thread, so that this one answers meanwhile."""

        def run() -> None:
            Path(sign).touch()
            self.kept["got"] = store.get(ref, timeout_s=60.0)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    @endpoint
    def longest_beat_gap(self, nbytes: int) -> float:
        """How long this process's other threads stood still at most while a large object was put."""
        gaps, over = [0.0], threading.Event()

        def watch() -> None:
            last = time.monotonic()
            while not over.wait(0.001):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        data = bytearray(nbytes)
        watcher = threading.Thread(target=watch)
        watcher.start()
        store.remove(store.put(data))
        over.set()
        watcher.join()
        return max(gaps)
