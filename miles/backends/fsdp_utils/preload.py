"""Imported once per node, in the zygote that ranks are forked from: torch, FSDP2 and the model classes.

Leaves one thread, no process, no socket and no CUDA context behind (``tests/fsdp/test_preload.py``).
"""

from __future__ import annotations

import importlib

for _family in ("qwen2", "qwen3", "llama"):
    importlib.import_module(f"transformers.models.{_family}.modeling_{_family}")
importlib.import_module("miles.backends.fsdp_utils.backend")  # torch.distributed.fsdp, .tensor and .checkpoint too
