"""Every parallel layout gives the loss, the log-probs, the gradient norm and the weights of the formula on one rank."""

import pytest
import torch
from support.plain_losses import assert_close
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, plain, trained

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
    "PP 2, rows padded": {"pipeline_model_parallel_size": 2, "qkv_format": "bshd", "use_dynamic_batch_size": False},
    "PP 2, DP 2, gradients reduced early": {
        "pipeline_model_parallel_size": 2,
        "dp_size": 2,
        "overlap_grad_reduce": True,
        "ddp_bucket_size": 2000,
    },
}


WITH_EXPERTS = {
    "one rank": {},
    "EP 2": {"expert_model_parallel_size": 2, "dp_size": 2},
    "EP 2 of 4": {"expert_model_parallel_size": 2, "dp_size": 4},
    "EP 4": {"expert_model_parallel_size": 4, "dp_size": 4},
    "EP 2, PP 2": {"expert_model_parallel_size": 2, "dp_size": 2, "pipeline_model_parallel_size": 2},
    "EP 2, CP 2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "SP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
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


UNTIED = ("PP 2", "SP 2")
"""Where an untied output layer is another case; in all others it is only another parameter."""


@pytest.mark.parametrize(
    ("tied", "name"),
    [(True, name) for name in LAYOUTS]
    + [pytest.param(False, name, marks=[pytest.mark.long] * (name not in UNTIED)) for name in LAYOUTS],
)
def test_a_rollout_gives_the_numbers_of_one_rank(expected, name, tied):
    path, changed, means, weights = expected[tied]
    layout = {"dp_size": 1, **LAYOUTS[name], **changed}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, 7):
        assert_close(metrics, means, name)
        assert list(found) == list(weights) or set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def moe():
    """By the layers that have no experts."""
    found = {}
    for without in ((), (1,)):
        path = tiny_model("qwen3_moe", layers=2, mlp_only_layers=without)
        found[without] = (path, *run_ranks(1, plain, path, {}, 7, distributed=False)[0])
    return found


DENSE = ("one rank", "EP 2, PP 2")
"""Where a layer without experts is another case: as such, and as a stage of its own."""


@pytest.mark.parametrize(
    ("without", "name"),
    [pytest.param((), name, id=name) for name in WITH_EXPERTS]
    + [
        pytest.param((1,), name, id=f"{name}, one layer without", marks=[pytest.mark.long] * (name not in DENSE))
        for name in WITH_EXPERTS
    ],
)
def test_a_model_with_experts_gives_the_numbers_of_one_rank(moe, without, name):
    path, means, weights = moe[without]
    layout = {"dp_size": 1, **WITH_EXPERTS[name]}
    for metrics, found in run_ranks(size_of(layout), trained, path, "megatron", layout, 7):
        assert_close(metrics, means, name)
        assert set(found) == set(weights)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5, msg=key)


def held(path, layout):
    """What this rank has of the model."""
    backend = backend_of("megatron", args_of(path, "megatron", **{"dp_size": 1, **layout}))
    backend.init()
    shapes = {name: tuple(parameter.shape) for name, parameter in backend.model.module.named_parameters()}
    return {
        "layers": len({name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")}),
        "experts": len({name.split(".")[6] for name in shapes if name.startswith("decoder.layers.0.mlp.experts")}),
        "width": next((shape[0] for name, shape in shapes.items() if "experts.0.linear_fc1" in name), None),
        "norms": backend.model.config.sequence_parallel,
    }


HELD = {
    "one rank": ({}, "layers experts width norms", [(4, 4, 96, False)]),
    "stages": ({"pipeline_model_parallel_size": 2}, "layers", [(2,), (2,)]),
    "a smaller first stage": (
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
        *("layers", [(1,), (3,)]),
    ),
    "a smaller last stage": (
        {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1},
        *("layers", [(3,), (1,)]),
    ),
    "experts": ({"expert_model_parallel_size": 2, "dp_size": 2}, "experts width", [(2, 96), (2, 96)]),
    "parts of experts": (
        {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        *("experts width norms", [(4, 48, True), (4, 48, True)]),
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_each_size_divides_what_it_names(name):
    layout, keys, expected = HELD[name]
    found = run_ranks(size_of(layout), held, tiny_model("qwen3_moe", layers=4), layout)
    assert [tuple(one[key] for key in keys.split()) for one in found] == expected


@pytest.fixture(scope="module")
def three_layers():
    path = tiny_model("qwen3", layers=3)
    return (path, *run_ranks(1, plain, path, {}, 7, distributed=False)[0])


@pytest.mark.parametrize("end", ["first", "last"])
def test_stages_of_different_sizes_give_the_numbers_of_one_rank(three_layers, end):
    path, means, weights = three_layers
    layout = {"dp_size": 1, "pipeline_model_parallel_size": 2, f"decoder_{end}_pipeline_num_layers": 1}
    for metrics, found in run_ranks(2, trained, path, "megatron", layout, 7):
        assert_close(metrics, means, end)
        for key, tensor in weights.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
