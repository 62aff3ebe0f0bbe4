"""Gradients, optimizer steps and handed-on weights equal those of plain PyTorch on the Hugging Face model."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support.hf_reference import hf_log_probs, load_hf_model
from support.megatron_cases import SumOfSquares, make_backend, micro_batches, own_part, sequences, weights_of
from support.ranks import run_ranks
from support.tiny_models import ARCHITECTURES, tiny_model

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


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
