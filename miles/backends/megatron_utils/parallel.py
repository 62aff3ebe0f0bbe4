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

_DENSE = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
}
_EXPERT = {
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
}


def init_parallel(args: Namespace) -> ParallelState:
    """Make the groups and seed the generators.

    Raises:
        UnsupportedParallelism: Sizes that do not fit the world, or each other.
    """
    tp, pp, cp = (parallel_size(args, name) for name in _DENSE)
    ep, etp = (parallel_size(args, name) for name in list(_EXPERT)[:2])
    _check_divides(args, _DENSE)
    _check_divides(args, _EXPERT)
    if getattr(args, "sequence_parallel", False) and tp == 1:
        raise UnsupportedParallelism(
            "--sequence-parallel needs tensor parallelism",
            evidence="--tensor-model-parallel-size is 1",
            advice="Leave --sequence-parallel out, or give a larger --tensor-model-parallel-size.",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    seed_generators(args.seed)
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=ep,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=etp,
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
    )


def parallel_size(args: Namespace, name: str) -> int:
    """Of a flag that may be absent."""
    return int(getattr(args, name, None) or 1)


def seed_generators(seed: int) -> None:
    """Of Python, numpy and torch, and megatron.core's own for each kind of parallelism."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global one is what user code may draw from
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def leave_parallel() -> None:
    """Forget the groups."""
    parallel_state.destroy_model_parallel()


def _check_divides(args: Namespace, flags: dict[str, str]) -> None:
    sizes = {flag: parallel_size(args, name) for name, flag in flags.items()}
    product, world = 1, dist.get_world_size()
    for size in sizes.values():
        product *= size
    if world % product:
        shown = " times ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        raise UnsupportedParallelism(
            f"{shown} does not divide the {world} ranks of the trainer",
            evidence=f"{product} ranks hold one copy of the model; there are {world}",
            advice="Choose sizes whose product divides --actor-num-nodes times --actor-num-gpus-per-node.",
        )
