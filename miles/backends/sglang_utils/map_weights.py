"""SGLang's side of a colocated weight update on a CPU: maps the trainer's memory and loads from it.

SGLang calls ``load`` as one of its ``custom_weight_loader`` functions, in each rank's scheduler. What it is given is a
description as text; the bytes lie in memory files of the trainer (``weight_update.shared_memory`` writes both), opened
through ``/proc``: no names in a file system, no helper process, nothing to clean up whoever dies first. That takes
the same user and the same view of processes, which are the same for all that an agent starts.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch

_mapped: dict[tuple[int, int, int], torch.Tensor] = {}
"""Memory by device, inode and size, for as long as an update goes on: its buckets come through the same two files."""


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Load the tensors of one bucket: its description is the name of the one (empty) tensor.

    Raises:
        OSError: the trainer's memory cannot be opened, or is not what the description says.
    """
    bucket = json.loads(named_tensors[0][0])
    start = time.perf_counter()
    if bucket["first"]:
        _mapped.clear()
    memory = _map(bucket)
    ready = time.perf_counter()
    model.load_weights([(entry["name"], _view(memory, entry)) for entry in bucket["tensors"]])
    done = time.perf_counter()
    times = memory[bucket["times_at"] :].view(torch.float64)
    times[0], times[1] = ready - start, done - ready
    if bucket["last"]:
        _mapped.clear()


def _map(bucket: dict[str, Any]) -> torch.Tensor:
    """The whole memory file as bytes."""
    path = f"/proc/{bucket['pid']}/fd/{bucket['fd']}"
    facts = os.stat(path)
    key = (facts.st_dev, facts.st_ino, facts.st_size)  # it grows for a tensor larger than a bucket
    if facts.st_ino != bucket["inode"] or facts.st_size != bucket["size"]:
        raise FileNotFoundError(f"{path} is not the trainer's memory any more: {facts}")
    memory = _mapped.get(key)
    if memory is None:
        storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=bucket["size"])
        memory = _mapped[key] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    return memory


def _view(memory: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, entry["dtype"])
    raw = memory[entry["start"] : entry["start"] + entry["bytes"]]
    return raw.view(dtype).reshape(entry["shape"])
