"""User code of the runs: imports nothing heavy. The strikes are told by files below ``STRIKE_DIR`` (``--env``)."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

_graded: list[int] = []
COLLECTIVE_S = 40.0
"""How long ranks wait in a collective for somebody to kill one."""


async def low_tokens(args: Any, sample: Any, **_: Any) -> float:
    """The share of the answer's tokens in the lower half of the vocabulary: dense, and known without a tokenizer."""
    half = _vocabulary(args.hf_checkpoint) // 2
    answer = sample.tokens[-sample.response_length :] if sample.response_length else []
    return float(sum(token < half for token in answer) / max(1, len(answer)))


@functools.cache
def _vocabulary(checkpoint: str) -> int:
    return int(json.loads((Path(checkpoint) / "config.json").read_text())["vocab_size"])


async def low_tokens_and_strike(args: Any, sample: Any, **more: Any) -> float:
    """``low_tokens``; at the ``STRIKE_ANSWER``-th answer an engine's scheduler is killed, once."""
    _graded.append(sample.index)
    if len(_graded) == int(os.environ["STRIKE_ANSWER"]):
        pid = _scheduler()
        note("engine", pid=pid)
        os.kill(pid, signal.SIGKILL)
    return await low_tokens(args, sample, **more)


def _scheduler() -> int:
    """The process of an engine that holds the GPU: engines and this process have the same agent."""
    import psutil

    beside = [one for parent in psutil.Process().parents() for one in parent.children()]
    engine = next(one for one in beside if any("launch_engine" in word for word in one.cmdline()))
    below = engine.children(recursive=True)
    return next((one.pid for one in below if any("scheduler" in word for word in one.cmdline())), engine.pid)


def strike_self(args: Any, rollout_id: int, step_id: int, *_: Any) -> None:
    """Before a step of the second rollout the rank kills itself, once."""
    if rollout_id == 1 and not _path("trainer").exists():
        note("trainer", pid=os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)


def wait_in_collective(args: Any, rollout_id: int, step_id: int, *_: Any) -> None:
    """Before a step of the third rollout all ranks are in one all-reduce after the other, until somebody is killed or
    ``COLLECTIVE_S`` are over. Once: if somebody has been struck, ranks say when they train again instead."""
    rank = int(os.environ["RANK"])
    if _path("struck").exists():
        note(f"again-{rollout_id}-{rank}", pid=os.getpid())
        return
    if rollout_id != 2:
        return
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() and args.device == "cuda" else "cpu"
    data = torch.ones((64 if device == "cuda" else 1) << 20, device=device)
    note(f"within-{rank}", pid=os.getpid())
    ends = time.monotonic() + COLLECTIVE_S
    while True:
        data.fill_(float(time.monotonic() > ends))
        try:
            for _turn in range(20):
                dist.all_reduce(data, op=dist.ReduceOp.MAX)
            over = float(data[0]) > 0
        except RuntimeError:  # gloo says so when the other one is gone; the run counts what hooks raise as the user's
            time.sleep(COLLECTIVE_S)
            raise
        if over:
            return


def note(name: str, **values: Any) -> None:
    """Leave a file with these values and the time; it is there at once, whole."""
    path = _path(name)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"at": time.time(), **values}))
    aside.rename(path)


def _path(name: str) -> Path:
    return Path(os.environ["STRIKE_DIR"]) / f"{name}.json"
