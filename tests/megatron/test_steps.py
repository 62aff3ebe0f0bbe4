"""Gradients, optimizer steps and handed-on weights equal those of plain PyTorch on the Hugging Face model."""

import importlib
import math

import pytest
import torch
from safetensors.torch import load_file
from support.hf_reference import hf_log_probs, load_hf_model
from support.megatron_cases import SumOfSquares, make_backend, micro_batches, own_part, sequences, weights_of
from support.ranks import run_ranks
from support.tiny_models import ARCHITECTURES, tiny_model

from miles.backends.base import LossOutput
from miles.backends.megatron_utils.errors import NonFiniteGradients, UnsupportedParallelism
from miles.backends.megatron_utils.parallel import leave_parallel
from miles_agents.errors import ConfigError

PLAIN_SGD = {"optimizer": "sgd", "sgd_momentum": 0.0, "lr": 1.0, "weight_decay": 0.0, "clip_grad": 0.0}
LAYOUTS = [(1, 1), (2, 1), (2, 2)]
"""World size, tensor-parallel size."""


def train(path, changed, steps, batch_size):
    ours = make_backend(path, **changed)
    loss = SumOfSquares(ours.parallel)
    outcomes = []
    for step in range(steps):
        outcome = ours.train_step(micro_batches(own_part(ours, sequences(seed=step)), batch_size), loss)
        outcomes.append((outcome.metrics["loss"].item(), outcome.grad_norm, outcome.learning_rate))
    return weights_of(ours), outcomes


def reference_loss(model, samples):
    return torch.stack([(hf_log_probs(model, sample) ** 2).sum() for sample in samples]).sum() / 10


def reference_gradients(path):
    model = load_hf_model(path)
    reference_loss(model, sequences(seed=0)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reference_adam(path, steps):
    """As Megatron: no weight decay on what has one dimension, clipped to norm 1."""
    model = load_hf_model(path)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        reference_loss(model, sequences(seed=step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


@pytest.mark.parametrize(
    ("architecture", "world", "tp"),
    [
        pytest.param(name, world, tp, marks=[pytest.mark.long] * (name != "qwen2" and world > 1))
        for name in ARCHITECTURES
        for world, tp in LAYOUTS
    ],
)
def test_gradients_equal_plain_pytorch(architecture, world, tp):
    path = tiny_model(architecture, tied=architecture != "llama")
    before = load_file(path / "model.safetensors")
    expected = run_ranks(1, reference_gradients, path, distributed=False)[0]
    changed = {**PLAIN_SGD, "tensor_model_parallel_size": tp}
    for after, outcomes in run_ranks(world, train, path, changed, 1, 2):
        norm = math.sqrt(sum(grad.square().sum().item() for grad in expected.values()))
        assert outcomes[0][1] == pytest.approx(norm, rel=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(before[name] - after[name], grad, atol=1e-5 * norm, rtol=1e-4)


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_adam_steps_equal_plain_pytorch(world, tp):
    path = tiny_model("qwen3")
    expected, norms = run_ranks(1, reference_adam, path, 3, distributed=False)[0]
    for after, outcomes in run_ranks(world, train, path, {"tensor_model_parallel_size": tp}, 3, 2):
        assert [outcome[1] for outcome in outcomes] == pytest.approx(norms, rel=1e-4)
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, atol=2e-5, rtol=1e-4)


def several_ways(path):
    """Gradients of the same samples in one micro-batch, in several, and with activations computed again."""
    found = []
    for size, changed in (
        (6, {}),
        (1, {}),
        (2, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        (2, {"recompute_granularity": "selective"}),
    ):
        ours = make_backend(path, **PLAIN_SGD, **changed)
        before = weights_of(ours)
        ours.train_step(micro_batches(sequences(), size), SumOfSquares(ours.parallel))
        found.append({name: before[name] - value for name, value in weights_of(ours).items()})
        ours.close()
    return found


def test_neither_micro_batches_nor_recomputing_change_gradients():
    first, *others = run_ranks(1, several_ways, tiny_model("qwen3"))[0]
    for other in others:
        for name, gradient in first.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5 * gradient.norm().item(), rtol=1e-4)


def uneven(path):
    """Rank 1 has no micro-batch in this step."""
    ours = make_backend(path, **PLAIN_SGD)
    batches = micro_batches(sequences(), 2) if ours.parallel.dp_rank == 0 else []
    before = weights_of(ours)
    outcome = ours.train_step(batches, SumOfSquares(ours.parallel))
    return outcome.metrics, {name: before[name] - value for name, value in weights_of(ours).items()}


def test_a_rank_without_micro_batches_takes_part_in_the_step():
    path = tiny_model("qwen3")
    (_, first), (metrics, second) = run_ranks(2, uneven, path)
    expected = run_ranks(1, several_ways, path)[0][0]
    assert metrics == {}
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, atol=1e-5 * gradient.norm().item(), rtol=1e-4)


def not_finite(path):
    ours = make_backend(path)
    good = SumOfSquares(ours.parallel)

    def bad(logits, batch):
        output = good(logits, batch)
        # Only one rank sees it; both must do the same about it.
        return LossOutput(output.loss * (float("nan") if ours.parallel.rank == 0 else 1.0), output.metrics)

    with pytest.raises(NonFiniteGradients) as caught:
        ours.train_step(micro_batches(sequences(), 2), bad)
    return str(caught.value)


def test_gradients_that_are_not_finite_stop_the_run_and_name_parameters():
    for told in run_ranks(2, not_finite, tiny_model("qwen3")):
        assert "E-MEG-005" in told
        assert "--no-check-for-nan-in-loss-and-grad" in told
    assert "decoder." in told


def learning_rates(path, changed):
    ours = make_backend(path, lr=1.0, num_rollout=8, **changed)
    loss = SumOfSquares(ours.parallel)
    return [ours.train_step(micro_batches(sequences(2), 2), loss).learning_rate for _ in range(8)]


SCHEDULES = {
    "constant": ({}, [1.0] * 8),
    "warm-up": ({"lr_warmup_iters": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    "warm-up from above zero": ({"lr_warmup_iters": 2, "lr_warmup_init": 0.5}, [0.5, 0.75, 1, 1, 1, 1, 1, 1]),
    "linear": ({"lr_decay_style": "linear", "min_lr": 0.2}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
    "shorter than the run": (
        {"lr_decay_style": "linear", "lr_decay_iters": 4, "min_lr": 0.2},
        [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_the_flags(name):
    changed, expected = SCHEDULES[name]
    assert run_ranks(1, learning_rates, tiny_model("qwen3", layers=1), changed)[0] == pytest.approx(expected)


OFFLOADED = [{}, {"optimizer_cpu_offload": True}]
OFFLOADED.append(OFFLOADED[1] | {"overlap_cpu_optimizer_d2h_h2d": True})


def on_the_host(path):
    """The same steps by Adam where the parameters are, and by Adam in host memory."""
    found = []
    for changed in OFFLOADED:
        found.append(train(path, {"params_dtype": "bfloat16", "weight_decay": 0.1} | changed, 3, 2))
        leave_parallel()
    return found


def test_adam_in_host_memory_makes_the_same_steps():
    (weights, outcomes), *others = run_ranks(1, on_the_host, tiny_model("qwen3"))[0]
    for theirs, their_outcomes in others:
        assert their_outcomes == outcomes
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights.items())


class AdamOfPackage(torch.optim.AdamW):
    """In place of Transformer Engine's: it can be on the device only."""

    def __init__(self, params, *, adam_w_mode, **values):
        assert adam_w_mode
        super().__init__(params, **values)


def beside_a_package(path):
    """As where Transformer Engine is installed; what Adam each run has, and its weights."""
    optimizers = importlib.import_module("megatron.core.optimizer")
    importlib.import_module("megatron.core.optimizer.distrib_optimizer").Adam = optimizers.Adam = AdamOfPackage
    optimizers.USING_PYTORCH_OPTIMIZER = False
    found = []
    for changed in [*OFFLOADED, {}]:
        backend = make_backend(path, params_dtype="bfloat16", **changed)
        found.append(
            [(type(part.optimizer).__name__, getattr(part.optimizer, "on_host", None))
             for part in backend.objects().optimizer.chained_optimizers]
        )  # fmt: skip
        leave_parallel()
        if len(found) == 1:
            weights = train(path, {"params_dtype": "bfloat16", "weight_decay": 0.1} | OFFLOADED[1], 3, 2)[0]
            leave_parallel()
    return found, weights


def test_adam_in_host_memory_does_without_the_packages_that_bring_their_own():
    (first, *others), weights = run_ranks(1, beside_a_package, tiny_model("qwen3"))[0]
    assert first == [("AdamOfPackage", None)]
    assert others[:2] == [[("FusedLayoutAdam", True)]] * 2
    [(expected, _)] = run_ranks(1, on_the_host, tiny_model("qwen3"))[0][:1]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


REFUSED = [
    ({"pipeline_model_parallel_size": 2}, "E-MEG-003"),
    ({"context_parallel_size": 2}, "E-MEG-003"),
    ({"expert_model_parallel_size": 2}, "E-MEG-003"),
    ({"sequence_parallel": True}, "E-MEG-003"),
    ({"tensor_model_parallel_size": 2}, "E-MEG-003"),
    ({"optimizer_cpu_offload": True, "optimizer": "sgd"}, "E-MEG-004"),
    ({"use_precision_aware_optimizer": True}, "E-MEG-004"),
    ({"optimizer": "muon"}, "E-MEG-004"),
    ({"params_dtype": "float16"}, "E-MEG-004"),
    ({"min_lr": 1.0}, "E-MEG-004"),
]


def refusals(path):
    told = []
    for changed, _ in REFUSED:
        try:
            make_backend(path, **changed)
        except ConfigError as error:
            told.append(error.code)
        leave_parallel()
    return told


def test_what_is_not_built_is_refused():
    assert run_ranks(1, refusals, tiny_model("qwen3"))[0] == [code for _, code in REFUSED]


def heads_that_do_not_divide(path):
    with pytest.raises(UnsupportedParallelism, match="3 does not divide the model"):
        make_backend(path, tensor_model_parallel_size=3)


def test_a_size_that_does_not_divide_the_model_is_refused():
    run_ranks(3, heads_that_do_not_divide, tiny_model("qwen3"))
