"""Imported once per node, in the zygote that ranks are forked from: torch and megatron.core, ready to use.

Leaves one thread, no process, no socket and no CUDA context behind.
"""

from miles.backends.megatron_utils import backend

__all__ = ["backend"]
