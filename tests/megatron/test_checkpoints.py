"""A run that is resumed from a checkpoint is, bit for bit, the run that went on."""

import random

import numpy as np
import pytest
import torch
from support.megatron_cases import make_backend, save_backend, train_one, weights_of
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from miles.backends.megatron_utils.errors import CheckpointMismatch

WARM_UP = {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 1e-5}


def everything(backend):
    """All that decides how the run goes on."""
    state = {f"weight {name}": value for name, value in weights_of(backend).items()}
    for part in backend.optimizer.chained_optimizers:
        for g, group in enumerate(part.optimizer.param_groups):
            state |= {f"group {g} {key}": value for key, value in group.items() if key != "params"}
            for p, parameter in enumerate(group["params"]):
                state[f"parameter {g} {p}"] = parameter.detach().clone()
                for key, value in part.optimizer.state[parameter].items():
                    state[f"{key} {g} {p}"] = value.clone()
    state["schedule"] = backend.scheduler.state_dict()
    state["draws"] = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    return state


def whole_run(path, changed, steps):
    backend = make_backend(path, **WARM_UP | changed)
    for number in range(steps):
        train_one(backend, number)
    return everything(backend)


def run_and_save(path, root, changed, steps):
    backend = make_backend(path, **WARM_UP | changed)
    for number in range(steps):
        train_one(backend, number)
    save_backend(backend, root, steps - 1)
    return everything(backend)


def resumed_run(path, root, changed, steps):
    args = {**WARM_UP, **changed, "load": str(root)}
    backend = make_backend(path, **args)
    start = backend.start
    for number in range(start, steps):
        train_one(backend, number)
    return start, everything(backend)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if torch.is_tensor(value):
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize(
    ("world", "changed"),
    [
        (1, {}),
        (1, {"params_dtype": "bfloat16"}),
        (1, {"params_dtype": "bfloat16", "optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True}),
        (1, {"optimizer": "sgd", "lr": 1e-2}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        pytest.param(2, {"tensor_model_parallel_size": 2, "params_dtype": "bfloat16"}, marks=pytest.mark.full),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.full),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param(2, {"context_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param(2, {"expert_model_parallel_size": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_two_steps_save_load_two_steps_equal_four(tmp_path, world, changed):
    experts = "expert_model_parallel_size" in changed
    path = tiny_model("qwen3_moe" if experts else "qwen3", tied="pipeline_model_parallel_size" in changed)
    expected = run_ranks(world, whole_run, path, changed, 4)
    run_ranks(world, run_and_save, path, tmp_path, changed, 2)
    for (start, ours), theirs in zip(run_ranks(world, resumed_run, path, tmp_path, changed, 4), expected, strict=True):
        assert start == 2
        assert_same(ours, theirs)


def loaded_state(path, root, changed):
    backend = make_backend(path, **{**WARM_UP, **changed, "load": str(root)})
    for number in range(2, 4):
        train_one(backend, number)
    return weights_of(backend), backend.scheduler.num_steps


@pytest.mark.parametrize("tp_before", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_checkpoint_goes_on_with_another_tensor_parallel_size(tmp_path, tp_before):
    # 300 rows are padded to 384 for one rank, and to 512 for two.
    path = tiny_model("qwen2", vocab=300, tied=False)
    before, after = {"tensor_model_parallel_size": tp_before}, {"tensor_model_parallel_size": 3 - tp_before}
    run_ranks(tp_before, run_and_save, path, tmp_path, before, 2)
    expected = run_ranks(tp_before, loaded_state, path, tmp_path, before)[0]
    for weights, steps in run_ranks(3 - tp_before, loaded_state, path, tmp_path, after):
        assert steps == expected[1]
        for name, value in expected[0].items():
            # Adam makes much of gradients that are zero but for rounding: those of key biases.
            torch.testing.assert_close(weights[name], value, atol=5e-5, rtol=1e-4)


LAYOUTS = {
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2},
    "DP 2": {},
}


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [("PP 2", "TP 2"), ("TP 2", "CP 2"), ("CP 2", "PP 2"), ("PP 2", "DP 2")])
def test_a_checkpoint_goes_on_with_another_layout(tmp_path, before, after):
    path = tiny_model("qwen3", vocab=300)
    run_ranks(2, run_and_save, path, tmp_path, LAYOUTS[before], 2)
    expected = run_ranks(2, loaded_state, path, tmp_path, LAYOUTS[before])[0]
    for weights, steps in run_ranks(2, loaded_state, path, tmp_path, LAYOUTS[after]):
        assert steps == expected[1]
        for name, value in expected[0].items():
            torch.testing.assert_close(weights[name], value, atol=5e-5, rtol=1e-4)


@pytest.mark.full
def test_experts_go_on_on_more_ranks(tmp_path):
    path = tiny_model("qwen3_moe")
    run_ranks(2, run_and_save, path, tmp_path, {"expert_model_parallel_size": 2}, 2)
    expected = run_ranks(2, loaded_state, path, tmp_path, {"expert_model_parallel_size": 2})[0]
    for weights, steps in run_ranks(4, loaded_state, path, tmp_path, {"expert_model_parallel_size": 4}):
        assert steps == expected[1]
        for name, value in expected[0].items():
            torch.testing.assert_close(weights[name], value, atol=5e-5, rtol=1e-4)


def refused(path, root, changed):
    try:
        make_backend(path, load=str(root), **changed)
    except CheckpointMismatch as error:
        return str(error)
    return "loaded"


def weights_alone(path, root, changed):
    return weights_of(make_backend(path, load=str(root), no_load_optim=True, **changed))


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_between_one_and_more_expert_ranks_only_weights_go_on(tmp_path, before, after):
    path = tiny_model("qwen3_moe")
    sizes = {"expert_model_parallel_size": before}, {"expert_model_parallel_size": after}
    run_ranks(before, run_and_save, path, tmp_path, sizes[0], 2)
    for text in run_ranks(after, refused, path, tmp_path, sizes[1]):
        assert f"saved with --expert-model-parallel-size {before}" in text
        assert "--no-load-optim" in text
    expected = run_ranks(before, weights_alone, path, tmp_path, sizes[0])[0]
    for weights in run_ranks(after, weights_alone, path, tmp_path, sizes[1]):
        for name, value in expected.items():
            assert torch.equal(weights[name], value)
