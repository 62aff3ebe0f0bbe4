"""Adam and SGD as flagged, in parallel layouts and on both backends, make the steps of torch's own optimizers."""

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import plain, trained

pytestmark = pytest.mark.full

SEED = 7
CLIP = 0.1
"""Below the gradients' norm in both steps, so that a norm that is wrong in a layout shows in every weight."""
ADAM = {
    "optimizer": "adam",
    "use_distributed_optimizer": True,
    "lr": 1e-2,
    "adam_eps": 1e-4,
    "weight_decay": 0.1,
    "clip_grad": CLIP,
}
"""With the usual ``--adam-eps`` a step is the sign of the gradient: any scale would pass, and where a gradient is
nothing but rounding, nothing would. At 1e-4, about the size of what is clipped, a step grows with the gradient, and
float32's rounding stays below ``TOLERANCE``."""
SGD = {"optimizer": "sgd", "sgd_momentum": 0.9, "lr": 1.0, "weight_decay": 0.1, "clip_grad": CLIP}
TOLERANCE = 2e-5

DENSE = {
    "one rank": {},
    "DP 2": {"dp_size": 2},
    "SP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2},
    "CP 2, DP 2": {"context_parallel_size": 2, "dp_size": 2},
    "PP 2, DP 2": {"pipeline_model_parallel_size": 2, "dp_size": 2},
    "SP 2, PP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    "SP 2, CP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
}
MOE = {
    "one rank": {},
    "EP 2": {"expert_model_parallel_size": 2, "dp_size": 2},
    "EP 2, SP 2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "EP 2, CP 2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "EP 2, PP 2": {"expert_model_parallel_size": 2, "dp_size": 2, "pipeline_model_parallel_size": 2},
    "EP 2 of 4": {"expert_model_parallel_size": 2, "dp_size": 4},
}
CASES = [("qwen3", name) for name in DENSE] + [("qwen3_moe", name) for name in MOE]
BY_DEFAULT = {("qwen3", "SP 2"), ("qwen3", "PP 2"), ("qwen3", "CP 2, DP 2"), ("qwen3_moe", "EP 2")}


def ranks_of(layout):
    size = layout.get("dp_size", 1)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        size *= layout.get(name, 1)
    return size


def expected_of(kind, changed):
    """The model, torch's weights after two steps, and those with twice the gradients: what must not pass."""
    path = tiny_model(kind, layers=2)
    steps = [dict(changed), {**changed, "clip_grad": 2 * CLIP}]
    found = [run_ranks(1, plain, path, one, SEED, distributed=False)[0] for one in steps]
    (means, weights), (_, twice) = found
    assert means["train/grad_norm"] > 4 * CLIP
    return path, means, weights, twice


@pytest.fixture(scope="module")
def with_adam():
    return {kind: expected_of(kind, ADAM) for kind in ("qwen3", "qwen3_moe")}


@pytest.fixture(scope="module")
def with_sgd():
    return expected_of("qwen3", SGD)


def assert_steps(ranks, expected):
    _, means, weights, twice = expected
    # The tolerance tells a gradient from its double, in each tensor.
    assert all((twice[name] - tensor).abs().max() > 10 * TOLERANCE for name, tensor in weights.items())
    for metrics, found in ranks:
        assert metrics["train/grad_norm"] == pytest.approx(means["train/grad_norm"], rel=1e-4)
        assert set(found) == set(weights)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind}, {name}", marks=[pytest.mark.long] * ((kind, name) not in BY_DEFAULT))
        for kind, name in CASES
    ],
)
def test_adam_makes_the_steps_of_torch_in_each_layout(with_adam, kind, name):
    layout = {"dp_size": 1, **(DENSE if kind == "qwen3" else MOE)[name]}
    assert_steps(
        run_ranks(ranks_of(layout), trained, with_adam[kind][0], "megatron", ADAM | layout, SEED), with_adam[kind]
    )


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_adam_makes_the_steps_of_torch_with_fsdp(with_adam, size):
    found = run_ranks(size, trained, with_adam["qwen3"][0], "fsdp", ADAM | {"dp_size": size}, SEED)
    assert_steps(found, with_adam["qwen3"])


@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
@pytest.mark.parametrize("size", [1, 2])
def test_sgd_makes_the_steps_of_torch(with_sgd, backend, size):
    assert_steps(run_ranks(size, trained, with_sgd[0], backend, SGD | {"dp_size": size}, SEED), with_sgd)
