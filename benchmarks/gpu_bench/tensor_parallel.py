"""Weight updates by NCCL from trainers of one and two tensor-parallel ranks into engines of two and of one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_bench import rehearsal
from gpu_bench.ipc import compare_with, engine
from gpu_bench.model import config_only, model
from gpu_bench.nccl import BUCKETS, LARGE, bare_seconds, bracket, target_of
from gpu_bench.placing import SHARED, Placing
from gpu_bench.results import Results
from gpu_bench.trainer_ranks import Task, updates_of
from gpu_bench.updates import TURNS, WARM_UP, tell
from main_job_bench.processes import RunFailed
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.weight_update.messages import EngineTarget

PAIRS = {2: (1, 2), 1: (2,)}
"""By an engine's ranks, those of the trainers that send to it, one after the other."""
_SMALL = "0.6B"
_RANKS_S, _SHARED_RANKS_S = 100.0, 140.0
_TOKENS = 16384
"""Of an engine's KV cache, so that the other engine fits beside it."""


@dataclass(frozen=True)
class Means:
    """What the stage starts and asks, for tests to put something else in its place."""

    engine: Callable[..., contextlib.AbstractAsyncContextManager[EngineClient]] = engine
    updates_of: Callable[..., list[dict[str, Any]]] = updates_of
    compare_with: Callable[..., Awaitable[str]] = compare_with
    bare_seconds: Callable[[Results, str, Sequence[int]], float] = bare_seconds


@dataclass(frozen=True)
class _Part:
    """Updates of one model's shape."""

    results: Results
    placing: Placing
    shape: str
    means: Means

    @property
    def checks(self) -> bool:
        """It shows that the bytes arrive; the other one, how fast."""
        return self.shape == _SMALL

    def told_failed(self, what: str, error: Exception) -> None:
        """One row."""
        name = f"{self.shape}: {what}{self.placing.note}"
        self.results.add(name, "failed", note=f"{type(error).__name__}: {error}"[-600:])


def nccl_tp2(results: Results, gpus: int, means: Means | None = None) -> None:
    """First the small model: after its updates each engine holds what it holds when it has loaded the trainer's export
    from disk. Then the large one, for its figures, unless ranks share GPUs: they would mean nothing. Raises
    ExceptionGroup with what failed, when all has been tried."""
    placing = Placing(gpus)
    failed: list[Exception] = []
    if placing.is_shared:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # it does not go with several ranks on a GPU
        results.add(LARGE, "left out", note=f"its figures would mean nothing with {SHARED}")
    for shape in (_SMALL,) if placing.is_shared else (_SMALL, LARGE):
        part = _Part(results, placing, shape, means or Means())
        bare = {ranks: _bare(part, ranks, failed) for ranks in PAIRS}
        failed += asyncio.run(_into_engines(part, bare))
    if failed:
        raise ExceptionGroup("updates failed", failed)


def _bare(part: _Part, ranks: int, failed: list[Exception]) -> float:
    """Seconds of a bare broadcast to as many ranks; 0 if it failed, which updates need not do for that. Also 0 for the
    small model on separate GPUs: its speed is the stage ``nccl``'s."""
    if part.checks and not part.placing.is_shared:
        return 0.0
    try:
        return part.means.bare_seconds(part.results, part.shape, part.placing.bare(ranks))
    except RunFailed as error:
        part.told_failed(f"bare NCCL broadcast to {ranks} ranks", error)
        failed.append(error)
        return 0.0


async def _into_engines(part: _Part, bare: Mapping[int, float]) -> list[Exception]:
    """The engines start beside each other, and get their updates one after the other. Returns what failed."""
    out = part.results.out
    failed: list[Exception] = []
    path = model(out, part.shape) if part.checks else config_only(out, rehearsal.shape(part.shape))
    async with contextlib.AsyncExitStack() as stack:
        starts = []
        for ranks in PAIRS:
            name, gpus = f"nccl-{part.shape}-to-{ranks}", part.placing.engine(ranks)
            started = part.means.engine(out, path, name, gpus=gpus, dummy=not part.checks, max_tokens=_TOKENS)
            starts.append(stack.enter_async_context(started))
        clients = await asyncio.gather(*starts, return_exceptions=True)
        for ranks, client in zip(PAIRS, clients, strict=True):
            try:
                if isinstance(client, BaseException):
                    raise client
                await _into(part, path, client, ranks, bare[ranks])
            except Exception as error:  # noqa: BLE001  # the other engine is tried all the same
                part.told_failed(f"into an engine of TP {ranks}", error)
                failed.append(error)
    return failed


async def _into(part: _Part, path: Path, client: EngineClient, engine_ranks: int, bare: float) -> None:
    """From trainers one after the other into one engine. Raises RunFailed, and RuntimeError if it holds other weights
    than were sent."""
    out, version = part.results.out, 1
    deadline_s = _SHARED_RANKS_S if part.placing.is_shared else _RANKS_S
    for ranks in PAIRS[engine_ranks]:
        name = f"nccl-{part.shape}-{ranks}-to-{engine_ranks}"
        export = out / f"export-{name}" if part.checks else None
        task = _task(path, target_of(client, engine_ranks), version, export)
        async with bracket(client):
            rows = await asyncio.to_thread(part.means.updates_of, out, name, task, ranks, deadline_s)
        version += len(rows) * (WARM_UP + TURNS)
        title = f"{part.shape}, TP {ranks} to TP {engine_ranks}{part.placing.note}"
        _tell_rows(part.results, title, rows, bare)
        if export is not None:
            await part.means.compare_with(part.results, client, export, version - 1, f"{title}: ")
            version += 1


def _task(path: Path, target: EngineTarget, version: int, export: Path | None) -> Task:
    """With an export one size of buckets does: it is about what arrives."""
    device = "cpu" if rehearsal.is_rehearsal() else "cuda"
    if export is None:
        return Task(str(path), [asdict(target)], BUCKETS, device, version)
    return Task(str(path), [asdict(target)], BUCKETS[:1], device, version, str(export))


def _tell_rows(results: Results, name: str, rows: Sequence[dict[str, Any]], bare: float) -> None:
    for row in rows:
        how = f"{name}, buckets of {row['bucket'] >> 20} MiB"
        seconds = tell(results, f"update, {how}", row["seconds"], bare, "the bare broadcast")
        share = f"{bare / seconds:.2f} of the bare broadcast; " if bare else ""
        results.add(how, row["num_bytes"] / seconds / 1e9, "GB/s", f"{share}{row['num_bytes']} bytes")
