"""A weight loader for real engines that tries ``LoadPlans`` with the model class that SGLang has made of a directory.

In each rank's scheduler, named as SGLang names loaders; see ``tests/engines/test_real_load_plans.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from miles.backends.sglang_utils.expert_places import expert_places
from miles.backends.sglang_utils.load_plan import LoadPlans
from miles.backends.weight_update.buckets import Entry
from support.bucket_cases import buckets_of
from support.fake_engine import load_directory

UPDATES = 4


def load_bucket(plans: LoadPlans, entries: Sequence[Entry], memory: torch.Tensor, cut: int) -> int:
    """Tensors come to their places, in so many pieces, if those are known, and the rest of the bucket is loaded.
    Returns how many pieces did."""
    spans = [(entry.start, entry.num_bytes) for entry in entries if entry.num_bytes]
    if cut > 1:
        spans = [(start + part * size // cut, size // cut) for start, size in spans for part in range(cut)]
    in_place = plans.in_place(entries, spans)
    if in_place is None:
        plans.load(entries, memory)
        return 0
    rest = memory.clone()
    for index, place in in_place.places.items():
        part = slice(spans[index][0], sum(spans[index]))
        place.copy_(memory[part])
        rest[part] = 0xA5
    in_place.load_rest(rest)
    return len(in_place.places)


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Several updates with random weights; each time the model must be as ``load_weights`` alone makes it.

    The name of the one tensor says, as JSON: ``weights``, a directory; ``capacity``, of a bucket; ``report``, a
    directory for a file ``<rank>.json``. Leaves the weights of the directory loaded.
    """
    task = json.loads(named_tensors[0][0])
    weights = load_directory(Path(task["weights"]))
    plans, differing, in_place = LoadPlans(model), [], 0
    for update in range(UPDATES):
        generator = torch.Generator().manual_seed(update)
        sent = {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in weights.items()}
        plans.begin()
        for entries, memory in buckets_of(sent, task["capacity"]):
            in_place += load_bucket(plans, entries, memory, dist.get_world_size())
        plans.end()
        held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_weights(list(sent.items()))
        differing += [
            f"{update} {name}" for name, tensor in model.state_dict().items() if not torch.equal(tensor, held[name])
        ]
    model.load_weights(list(weights.items()))
    places = expert_places()
    report = {
        "experts_placed": 0 if places is None else len(places),
        "model": type(model).__name__,
        "differing": differing,
        "refusal": plans.refusal,
        "counts": [plans.recorded, plans.checked, plans.replayed, plans.plain],
        "buckets": sum(1 for _ in buckets_of(weights, task["capacity"])),
        "loaded": len(weights),
        "in_place": in_place,
        "placed": plans.placed,
    }
    (Path(task["report"]) / f"{dist.get_rank()}.json").write_text(json.dumps(report))
