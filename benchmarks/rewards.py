"""How many answers per second the built-in rewards grade, in one process: ``python benchmarks/rewards.py``.

Responses have 10,000 characters, answers differ, nothing is cached. Algebra: by one grader process, and by as many as a
run has, asked from one loop.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any

from miles.rollout.rm_hub.f1 import f1_score
from miles.rollout.rm_hub.gpqa import compute_gpqa_reward
from miles.rollout.rm_hub.grader_pool import GraderPool
from miles.rollout.rm_hub.math_compare import quick_verdict
from miles.rollout.rm_hub.math_dapo_utils import compute_score
from miles.rollout.rm_hub.math_text import same_text
from miles.rollout.rm_hub.math_utils import answers_of

TEXT = "So we look at the next case. " * 345


def quick(response: str, label: str) -> bool | None:
    """``math`` as far as no grader is needed."""
    pair = answers_of(response, label)
    return pair is not None and (same_text(*pair) or quick_verdict(*pair))


def rate(grade: Callable[[int], Any], seconds: float) -> float:
    """Calls per second."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(50):
            grade(count)
            count += 1
    return count / (time.perf_counter() - began)


async def algebra(size: int, pair: Callable[[int], tuple[str, str]], count: int) -> float:
    """Pairs per second by so many graders."""
    pool = GraderPool(size)
    try:
        await asyncio.gather(*(pool.equal(f"{i}+x", f"x+{i}") for i in range(8 * size)))  # all have started
        began = time.perf_counter()
        await asyncio.gather(*(pool.equal(*pair(i)) for i in range(count)))
        return count / (time.perf_counter() - began)
    finally:
        await asyncio.to_thread(pool.close)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    seconds = parser.parse_args().seconds
    count = max(20, int(400 * seconds))
    lines: dict[str, float] = {
        "math, the label's own text": rate(lambda i: quick(f"{TEXT}\\boxed{{{i}}}", str(i)), seconds),
        "math, another number": rate(lambda i: quick(f"{TEXT}\\boxed{{{i}}}", str(i + 1)), seconds),
        "dapo": rate(lambda i: compute_score(f"{TEXT}\nAnswer: {i}", str(i)), seconds),
        "gpqa": rate(lambda i: compute_gpqa_reward(f"{TEXT}\nAnswer: C", "C"), seconds),
        "f1, the whole response": rate(lambda i: f1_score(TEXT, "the next case"), seconds),
    }
    kinds: dict[str, Callable[[int], tuple[str, str]]] = {
        "algebra, right": lambda i: (f"{i}\\sqrt{{3}}+x", f"x+\\sqrt{{{3 * i * i}}}"),
        "algebra, wrong": lambda i: (f"\\frac{{{i + 5}x+1}}{{2}}", "\\frac{x+1}{2}"),
    }
    for name, pair in kinds.items():
        for size in (1, 0):
            lines[f"{name}, {'one grader' if size else 'graders of a run'}"] = asyncio.run(algebra(size, pair, count))
    for name, per_second in lines.items():
        print(f"{name:36} {per_second:10,.0f} answers/s")


if __name__ == "__main__":
    main()
