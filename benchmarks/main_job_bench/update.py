"""The colocated weight update, in the job as a user runs it; answers are short, so that it is mostly updates.

The job's own clocks tell its parts. Before each, while neither side works, the process that generates makes a memcpy of
the same number of bytes (``hooks``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from main_job_bench import ours
from main_job_bench.figures import OURS, Update
from main_job_bench.processes import RunFailed
from main_job_bench.sizes import Size
from main_job_bench.workload import PROMPTS

_PREFIX, _SUFFIX = "perf/update_weights/", "_time"
_TOTAL = "perf/update_weights_time"
_GATHER, _COPY, _LOAD = "gather", "copy", "engine_copy"


def sized(size: Size) -> Size:
    """The job in which updates are measured: their model, and as little else as can be."""
    return replace(
        size,
        model=size.update_model,
        prompts=1,
        group=2,
        steps=1,
        micro_batch=2,
        shortest=2,
        longest=4,
        iterations=size.updates,
        warm_up=1,
    )


def measure(size: Size, directory: Path, scratch: Path, *, deadline_s: float) -> list[Update]:
    """One run of that job; ``size`` and the prompts of ``directory`` are those of ``sized``. Raises RunFailed."""
    copies = scratch / "memcpy.jsonl"
    num_bytes = 4 * size.model.num_parameters
    wanted = {"every": size.samples, "bytes": num_bytes, "file": str(copies)}
    path = directory / PROMPTS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["metadata"]["memcpy"] = wanted
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = ours.Layout(OURS, 1, 1)
    lines = ours.run_job(
        size, layout, directory, scratch, generate="generate_beside_memcpy", deadline_s=deadline_s
    ).rows
    seconds = [json.loads(line)["memcpy"] for line in copies.read_text().splitlines()]
    return updates(lines, seconds, warm_up=size.warm_up, num_bytes=num_bytes)


def updates(
    rows: Sequence[Mapping[str, Any]], memcpy: Sequence[float], *, warm_up: int, num_bytes: int
) -> list[Update]:
    """From a run's lines and the memcpys that were made in between. Pure. Raises RunFailed."""
    rollouts = [row for row in rows if row["event"] == "rollout"]
    if len(memcpy) != len(rollouts):
        raise RunFailed(f"{len(memcpy)} memcpys, but {len(rollouts)} iterations")
    found = [_update(row, seconds, num_bytes) for row, seconds in zip(rollouts, memcpy, strict=True)]
    return found[warm_up:]


def _update(row: Mapping[str, Any], memcpy: float, num_bytes: int) -> Update:
    clocks = {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): float(value)
        for name, value in row.items()
        if name.startswith(_PREFIX) and value is not None
    }
    missing = [name for name in (_GATHER, _COPY, _LOAD) if name not in clocks]
    if missing or row.get(_TOTAL) is None:
        raise RunFailed(f"the line of rollout {row.get('rollout_id')} does not tell {', '.join(missing) or _TOTAL}")
    return Update(
        total=float(row[_TOTAL]),
        gathering=clocks[_GATHER],
        copying=clocks[_COPY],
        loading=clocks[_LOAD],
        memcpy=memcpy,
        num_bytes=num_bytes,
        detail=clocks,
    )
