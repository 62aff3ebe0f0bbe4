"""The model that a run has without ``--custom-model-provider-path``, for functions of users that begin with it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from miles.backends.megatron_utils.families import read_shape
from miles.backends.megatron_utils.model import default_model, transformer_config


def get_model_provider_func(args: Namespace, role: str = "actor") -> Callable[..., Any]:
    """A function ``(pre_process=True, post_process=True, vp_stage=None)`` that builds it.

    Args:
        args: What ``megatron.training.get_args()`` gives in a trainer's rank.
        role: The same for all roles that there are.
    """

    def provide(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
        shape = read_shape(args.hf_config)
        dtype: torch.dtype = getattr(torch, args.params_dtype)
        config = transformer_config(args, shape, dtype)
        return default_model(args, shape, config, pre_process=pre_process, post_process=post_process)

    return provide
