"""``megatron.training.get_args`` where Megatron-LM is not installed: hooks of users call it.

megatron-core from PyPI holds ``megatron.core`` only. In a rank's process the few names below stand in for the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from argparse import Namespace
from typing import Any

_NAMES = ("megatron.training", "megatron.training.global_vars")


def provide_get_args(args: Namespace) -> None:
    """Make ``from megatron.training import get_args`` give ``args`` in this process. The last one given counts.

    Nothing is done where Megatron-LM itself can be imported: its own is meant then.
    """
    ours = getattr(sys.modules.get("megatron.training"), "__miles__", False)
    if not ours and importlib.util.find_spec("megatron.training") is not None:
        return
    parent: Any = importlib.import_module("megatron")
    for name in _NAMES:
        module: Any = sys.modules.setdefault(name, types.ModuleType(name, __doc__))
        module.__miles__ = True
        module.get_args = lambda: args
        setattr(parent, name.rpartition(".")[2], module)
        parent = module
    sys.modules["megatron.training"].__path__ = []
