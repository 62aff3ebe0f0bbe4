"""An engine whose answers take scripted times, one in so many a long one: the fake engine of the tests, which the same
tests hold to the protocol as the real one, without its tokens one by one.

    python -m async_bench.engine --model DIR --core 1 --short 0.5 --long 2.0 --every 32

prints its address and serves until stdin ends.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from support.fake_engine import FakeEngine, Request

SLICE_S = 0.01


class ScriptedEngine(FakeEngine):  # type: ignore[misc]
    """Answers of ``tokens`` tokens after ``short`` seconds, each ``every``-th after ``long``. Time does not pass while
    it is paused."""

    def __init__(self, *, short: float, long: float, every: int, tokens: int = 8, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._latencies = itertools.cycle([short] * (every - 1) + [long])
        self._tokens = tokens

    async def _answer(self, input_ids: list[int], sampling: dict[str, Any], rid: str | None) -> Request:
        answer = Request(rid or next(self._rids), input_ids, self._tokens, set(), 0)
        self.requests[answer.rid] = answer
        left = next(self._latencies)
        try:
            while answer.finish is None and left > 0:
                await self._go.wait()
                began = time.monotonic()
                await asyncio.sleep(min(SLICE_S, left))
                left -= time.monotonic() - began
            if answer.finish is None:
                answer.tokens = [(len(input_ids) + place) % 251 for place in range(self._tokens)]
                answer.finish = {"type": "length", "length": self._tokens}
        finally:
            self.requests.pop(answer.rid, None)
        return answer


async def _serve(options: argparse.Namespace) -> None:
    engine = ScriptedEngine(model=options.model, short=options.short, long=options.long, every=options.every)
    await engine.start()
    print(engine.url.removeprefix("http://"), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await engine.stop()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--short", type=float, required=True)
    parser.add_argument("--long", type=float, required=True)
    parser.add_argument("--every", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # the router tries HTTP/2 first
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()
