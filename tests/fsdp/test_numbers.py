"""Log-probs, gradients and optimizer steps are those of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from support.backend_cases import NextTokenLoss, backend_args, log_probs, micro_batch, plain_loss, sequences, share
from support.hf_reference import hf_log_probs, load_hf_model
from support.ranks import run_ranks
from support.tiny_models import ARCHITECTURES, PAD_ID, tiny_model


def forward(path, batches, **flags):
    from miles.backends.fsdp_utils.backend import FSDPBackend

    backend = FSDPBackend(backend_args(path, **flags))
    assert backend.init() == 0
    return [torch.cat(values) for values in backend.forward_only(batches, log_probs)]


def step(path, samples, per_batch, steps=1, **flags):
    """One optimizer step over all ranks; weights, outcome and the gradients' norms by name."""
    import torch.distributed as dist

    from miles.backends.fsdp_utils.backend import FSDPBackend

    backend = FSDPBackend(backend_args(path, **flags))
    backend.init()
    mine = share(samples, dist.get_rank(), dist.get_world_size())
    batches = [micro_batch(mine[i : i + per_batch]) for i in range(0, len(mine), per_batch)]
    outcomes = [backend.train_step(batches, NextTokenLoss(len(samples))) for _ in range(steps)]
    losses = torch.stack([outcome.metrics["loss"] for outcome in outcomes])
    dist.all_reduce(losses)
    weights = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    return weights, losses, [outcome.grad_norm for outcome in outcomes]


def plain_steps(path, samples, steps=1, lr=1e-3, clip=1.0):
    """The same by the Hugging Face model and torch's own AdamW."""
    model = load_hf_model(path)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = plain_loss(model, samples)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
        optimizer.step()
        losses.append(loss.detach())
    return {name: weight.detach() for name, weight in model.named_parameters()}, torch.stack(losses), norms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probs_are_those_of_the_hugging_face_model(architecture, attention):
    path = tiny_model(architecture, tied=architecture != "llama", shards=1 if architecture == "qwen2" else 3)
    samples = sequences(7)
    (expected,) = run_ranks(1, _plain_log_probs, path, samples, distributed=False)
    results = run_ranks(2, _forward_with, path, samples, attention)
    for found in results:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def _plain_log_probs(path, samples):
    model = load_hf_model(path)
    return torch.cat([hf_log_probs(model, sample).detach() for sample in samples])


def _forward_with(path, samples, attention):
    batches = [micro_batch(samples[:4]), micro_batch(samples[4:], padding=5)]
    return torch.cat(forward(path, batches, attn_implementation=attention))


def test_packed_equals_one_by_one():
    path = tiny_model("qwen3")
    samples = sequences(12, seed=1, shortest=1, longest=40)
    together, apart = run_ranks(1, _packed_and_apart, path, samples)[0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def _packed_and_apart(path, samples):
    batches = [micro_batch(samples), *(micro_batch([sample]) for sample in samples)]
    together, *apart = forward(path, batches)
    return together, torch.cat(apart)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_equal_those_of_one_plain_process(architecture, world_size):
    path = tiny_model(architecture, tied=architecture != "llama", vocab=323)
    samples = sequences(8, seed=2)
    ((expected, losses, norms),) = run_ranks(1, plain_steps, path, samples, 3, distributed=False)
    for found, found_losses, found_norms in run_ranks(world_size, step, path, samples, 2, 3):
        assert set(found) == set(expected)
        torch.testing.assert_close(found_losses, losses, atol=1e-5, rtol=0)
        assert found_norms == pytest.approx(norms, abs=1e-4)
        for name, weight in expected.items():
            # Softmax does not see a bias of all keys: its gradient is rounding, which Adam makes as large as any.
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_sums_over_micro_batches_and_ranks(world_size):
    path = tiny_model("qwen3", tied=False)
    samples = [[*sample, PAD_ID, *sample[:2]] for sample in sequences(8, seed=3)]  # models write that token, too
    (expected,) = run_ranks(1, _plain_gradients, path, samples, distributed=False)
    for gradients in run_ranks(world_size, _gradients, path, samples):
        assert set(gradients) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def _plain_gradients(path, samples):
    model = load_hf_model(path)
    plain_loss(model, samples).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _gradients(path, samples):
    import torch.distributed as dist

    from miles.backends.fsdp_utils.backend import FSDPBackend

    mine = share(samples, dist.get_rank(), dist.get_world_size())
    # Plain SGD without momentum, decay and clipping moves weights by the gradient itself.
    backend = FSDPBackend(
        backend_args(
            path,
            gradient_checkpointing=True,
            optimizer="sgd",
            sgd_momentum=0.0,
            weight_decay=0.0,
            clip_grad=0.0,
            lr=1.0,
        )
    )
    backend.init()
    before = {name: tensor.clone() for name, tensor in backend.hf_weights()}
    backend.train_step([micro_batch(mine[:2]), micro_batch(mine[2:])], NextTokenLoss(len(samples)))
    return {name: before[name] - tensor for name, tensor in backend.hf_weights()}
