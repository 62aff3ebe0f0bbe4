"""Process groups and random generators of megatron.core, on a ``torch.distributed`` that is initialised already."""

from __future__ import annotations

import random
from argparse import Namespace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from miles.backends.base import ParallelState
from miles.backends.megatron_utils.errors import UnsupportedParallelism

_NOT_BUILT = {
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
}


def init_parallel(args: Namespace) -> ParallelState:
    """Make the groups and seed the generators.

    Raises:
        UnsupportedParallelism: A kind that the backend does not do, or sizes that do not fit the world.
    """
    _refuse_what_is_not_built(args)
    size = args.tensor_model_parallel_size
    if dist.get_world_size() % size:
        raise UnsupportedParallelism(
            f"--tensor-model-parallel-size {size} does not divide the {dist.get_world_size()} ranks of the trainer",
            evidence=f"ranks: {dist.get_world_size()}",
            advice="Choose a size that divides --actor-num-nodes times --actor-num-gpus-per-node.",
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size, create_gloo_process_groups=False)
    seed_generators(args.seed)
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=size,
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


def seed_generators(seed: int) -> None:
    """Of Python, numpy and torch, and megatron.core's own for each kind of parallelism."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global one is what user code may draw from
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def leave_parallel() -> None:
    """Forget the groups."""
    parallel_state.destroy_model_parallel()


def _refuse_what_is_not_built(args: Namespace) -> None:
    for name, flag in _NOT_BUILT.items():
        value = getattr(args, name, None) or 1
        if value != 1:
            raise UnsupportedParallelism(
                f"{flag} {value} is not built yet",
                evidence="the Megatron backend does tensor and data parallelism",
                advice=f"Leave {flag} out.",
            )
    if getattr(args, "sequence_parallel", False):
        raise UnsupportedParallelism(
            "--sequence-parallel is not built yet",
            evidence="the Megatron backend does tensor and data parallelism",
            advice="Leave --sequence-parallel out.",
        )
