"""Every parallel layout gives the loss, the log-probs, the gradient norm and the weights of the formula on one rank."""

import pytest
import torch
from support.plain_losses import assert_close
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import plain, trained

pytestmark = pytest.mark.full


LAYOUTS = {
    "SP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2},
    "TP 2, PP 2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "SP 2, CP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    "PP 2, CP 2": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
    "PP 2, DP 2": {"pipeline_model_parallel_size": 2, "dp_size": 2},
    "CP 2, DP 2": {"context_parallel_size": 2, "dp_size": 2},
    "CP 4": {"context_parallel_size": 4},
}


WITH_EXPERTS = {
    "one rank": {},
    "EP 2": {"expert_model_parallel_size": 2, "dp_size": 2},
    "EP 2 of 4": {"expert_model_parallel_size": 2, "dp_size": 4},
    "EP 4": {"expert_model_parallel_size": 4, "dp_size": 4},
    "EP 2, PP 2": {"expert_model_parallel_size": 2, "dp_size": 2, "pipeline_model_parallel_size": 2},
    "EP 2, CP 2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "EP 2, SP 2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "ETP 2, SP 2": {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def size_of(layout):
    size = layout.get("dp_size", 1)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        size *= layout.get(name, 1)
    return size


@pytest.fixture(scope="module")
def expected():
    """By whether the embedding is tied, and whether losses are per token."""
    found = {}
    for tied in (True, False):
        path = tiny_model("qwen3", tied=tied, layers=2)
        changed = {"calculate_per_token_loss": not tied}
        found[tied] = (path, changed, *run_ranks(1, plain, path, changed, 7, distributed=False)[0])
    return found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_rollout_gives_the_numbers_of_one_rank(expected, name, tied):
    path, changed, means, weights = expected[tied]
    layout = {"dp_size": 1, **LAYOUTS[name], **changed}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, 7):
        assert_close(metrics, means, name)
        assert list(found) == list(weights) or set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.fixture(scope="module", params=[(), (1,)], ids=["experts everywhere", "one layer without"])
def moe(request):
    path = tiny_model("qwen3_moe", layers=2, mlp_only_layers=request.param)
    return (path, *run_ranks(1, plain, path, {}, 7, distributed=False)[0])


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_model_with_experts_gives_the_numbers_of_one_rank(moe, name):
    path, means, weights = moe
    layout = {"dp_size": 1, **WITH_EXPERTS[name]}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, 7):
        assert_close(metrics, means, name)
        assert set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5, msg=key)
