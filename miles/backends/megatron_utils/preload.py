"""Imported once per node, in the zygote that ranks are forked from: torch and megatron.core, ready to use.

Leaves one thread, no process, no socket and no CUDA context behind (``tests/megatron/test_preload.py``).
"""

from __future__ import annotations

from miles.backends.megatron_utils import device_shim
from miles.backends.megatron_utils.device_shim import install

install()

__all__ = ["device_shim"]
