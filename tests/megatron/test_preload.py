"""What a zygote imports for the ranks can be forked, and what it puts in place stays within megatron.core."""

import subprocess
import sys

import pytest
import torch
from support.megatron_cases import backend_args
from support.ranks import run_ranks
from support.tiny_models import tiny_model

LOOK = """
from miles_agents.worker.zygote_safety import Holdings, why_unsafe
before = Holdings.now()
import miles.backends.megatron_utils.preload
assert why_unsafe(before) == "", why_unsafe(before)
"""


@pytest.mark.full
def test_a_zygote_accepts_what_the_import_leaves_behind():
    # As workers do: warnings are errors, and one thread.
    subprocess.run([sys.executable, "-W", "error", "-c", LOOK], check=True, env={"OMP_NUM_THREADS": "1"}, timeout=250)


def views():
    import megatron.core.optimizer.optimizer as theirs

    assert theirs.torch is not torch
    assert theirs.torch.cuda.current_device() == torch.device("cpu")
    assert theirs.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert theirs.torch.Tensor is torch.Tensor
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.ones(1).cuda()


def test_only_megatron_sees_a_cuda_that_is_the_cpu():
    run_ranks(1, views, distributed=False)


def asks_for_args(first, second):
    from miles.backends.megatron_utils.megatron_training import provide_get_args

    provide_get_args(first)
    from megatron.training import get_args
    from megatron.training.global_vars import get_args as same

    assert get_args().lr == same().lr == 1e-3
    provide_get_args(second)
    import megatron.core
    import megatron.training

    return megatron.training.get_args().lr


def test_hooks_find_the_arguments_where_megatron_lm_has_them():
    model = tiny_model("qwen3")
    arguments = backend_args(model), backend_args(model, lr=5.0)
    assert run_ranks(1, asks_for_args, *arguments, distributed=False) == [5.0]
