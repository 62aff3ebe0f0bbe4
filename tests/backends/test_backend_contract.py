"""What every training backend does, and what all of them compute alike (``miles/backends/base.py``)."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.backend_cases import NextTokenLoss, backend_args, log_probs, micro_batch, sequences, share
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import ARCHITECTURES, tiny_model

from miles.backends.base import LossOutput

BACKENDS = {
    "megatron": ("miles.backends.megatron_utils.backend", "MegatronBackend"),
    "fsdp": ("miles.backends.fsdp_utils.backend", "FSDPBackend"),
}
every_backend = pytest.mark.parametrize("kind", BACKENDS)
on_ranks = pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.full)])


def made(kind, path, **flags):
    module, name = BACKENDS[kind]
    backend = getattr(importlib.import_module(module), name)(backend_args(path, **flags))
    return backend, backend.init()


def train(backend, rollout_ids):
    """A step of two micro-batches for each rollout: loss over all ranks and gradient norm."""
    import torch.distributed as dist

    shown = []
    for rollout_id in rollout_ids:
        samples = sequences(8, seed=rollout_id)
        mine = share(samples, backend.parallel.dp_rank, backend.parallel.dp_size)
        outcome = backend.train_step([micro_batch(mine[:1]), micro_batch(mine[1:])], NextTokenLoss(len(samples)))
        loss = outcome.metrics["loss"].clone()
        dist.all_reduce(loss)
        assert outcome.stepped
        assert outcome.learning_rate > 0
        shown.append((float(loss), outcome.grad_norm))
    return shown


def weights(backend):
    return {name: tensor.clone() for name, tensor in backend.hf_weights()}


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("architecture", "world_size"),
    [("qwen2", 1), ("qwen3", 1), ("llama", 1), pytest.param("qwen3", 2, marks=pytest.mark.full)],
)
def test_all_backends_compute_alike(architecture, world_size):
    path = tiny_model(architecture, tied=architecture != "llama", shards=2)
    megatron, fsdp = (run_ranks(world_size, _compute, kind, path) for kind in BACKENDS)
    for (their_values, their_steps), (values, steps) in zip(megatron, fsdp, strict=True):
        torch.testing.assert_close(values, their_values, atol=1e-4, rtol=0)
        for ours, theirs in zip(steps, their_steps, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def _compute(kind, path):
    backend, start = made(kind, path)
    assert start == 0
    values = backend.forward_only([micro_batch(sequences(3)), micro_batch(sequences(2, seed=9))], log_probs)
    steps = train(backend, range(3))
    backend.close()
    return torch.cat([value for batch in values for value in batch]), steps


@every_backend
def test_parallel_state_and_order_of_results(kind):
    for rank, (place, lengths) in enumerate(run_ranks(2, _places, kind, tiny_model("qwen3"))):
        assert place == (rank, 2, rank, 2, 0, 1)
        assert lengths == [[7], [3, 5], [4]]


def _places(kind, path):
    backend, _ = made(kind, path)
    batches = [[[1] * 7], [[2] * 3, [3] * 5], [[4] * 4]]
    found = backend.forward_only([micro_batch(batch) for batch in batches], _shape)
    for batch, (tokens, beyond, _) in zip(batches, found, strict=True):
        assert tokens == sum(map(len, batch))
        assert beyond == 0, "a backend may pad the vocabulary, with what has no probability"
    p = backend.parallel
    backend.close()
    return (p.rank, p.world_size, p.dp_rank, p.dp_size, p.tp_rank, p.tp_size), [lengths for _, _, lengths in found]


def _shape(logits, batch):
    assert logits.dtype == torch.float32
    return len(logits), float(logits.softmax(-1)[:, 320:].sum()), batch.total_lengths


@every_backend
@on_ranks
def test_training_moves_the_loss_down(kind, world_size):
    for losses in run_ranks(world_size, _losses, kind, tiny_model("qwen3")):
        assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses


def _losses(kind, path):
    backend, _ = made(kind, path)
    losses = [loss for loss, _ in train(backend, [0] * 5)]
    backend.close()
    return losses


@every_backend
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_back_as_in_the_files(kind, architecture):
    path = tiny_model(architecture, tied=architecture == "qwen2", vocab=323)
    expected = load_file(path / "model.safetensors")
    for found in run_ranks(2, _weights, kind, path):
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _weights(kind, path):
    backend, _ = made(kind, path)
    found = weights(backend)
    backend.close()
    return found


@every_backend
@on_ranks
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, kind, world_size):
    path = tiny_model("qwen3", vocab=323)
    through = run_ranks(world_size, _train_through, kind, path, tmp_path)
    for (shown, final), (start, later, later_final) in zip(
        through, run_ranks(world_size, _resume, kind, path, tmp_path), strict=True
    ):
        assert start == 2
        assert later == shown[2:]
        assert same(final, later_final)


def _train_through(kind, path, root):
    import torch.distributed as dist

    backend, start = made(kind, path, lr_decay_style="linear")
    shown = train(backend, range(start, 2))
    directory = Path(root) / "iter_0000001"
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    backend.save(directory, rollout_id=1)
    dist.barrier()
    (Path(root) / "latest_checkpointed_iteration.txt").write_text("1")
    shown += train(backend, range(2, 4))
    final = weights(backend)
    backend.close()
    return shown, final


def _resume(kind, path, root):
    backend, start = made(kind, path, load=str(root), lr_decay_style="linear")
    shown = train(backend, range(start, 4))
    final = weights(backend)
    backend.close()
    return start, shown, final


@pytest.mark.long  # what each backend's own tests of sleeping show, alike for both
@every_backend
@on_ranks
def test_sleeping_changes_nothing(tmp_path, kind, world_size):
    for slept, awake in run_ranks(world_size, _sleep, kind, tiny_model("qwen3", vocab=323), tmp_path):
        assert slept[0] == awake[0]
        assert same(slept[1], awake[1])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def _sleep(kind, path, directory):
    flags = {"offload_train_target": "disk", "offload_train_disk_dir": str(directory), "use_kl_loss": True}
    backend, _ = made(kind, path, **flags)
    train(backend, [0])
    backend.wake_up()
    backend.sleep(1)
    before = weights(backend)
    backend.sleep(2)
    backend.sleep(2)
    backend.wake_up()
    backend.wake_up()
    assert same(before, weights(backend))
    slept = train(backend, [1, 2]), weights(backend)
    backend.close()
    through, _ = made(kind, path, use_kl_loss=True)
    awake = train(through, [0, 1, 2])[1:], weights(through)
    through.close()
    return slept, awake


@every_backend
def test_the_reference_model_stays_as_it_was(kind):
    path, other = tiny_model("qwen3"), tiny_model("qwen3", seed=3)
    ((before, after, actor), (wanted, _, _)) = run_ranks(1, _reference, kind, path, other)[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(before, wanted, atol=1e-6, rtol=0)
    assert (actor - after).abs().max() > 1e-3


def _reference(kind, path, other):
    found = []
    for model, ref_load in ((path, str(other)), (other, None)):
        backend, _ = made(kind, model, use_kl_loss=True, ref_load=ref_load)
        batches = [micro_batch(sequences(3))]
        before = torch.cat(backend.forward_only(batches, log_probs, model="ref")[0])
        train(backend, [0])
        after = torch.cat(backend.forward_only(batches, log_probs, model="ref")[0])
        found.append((before, after, torch.cat(backend.forward_only(batches, log_probs)[0])))
        backend.close()
    return found


class BrokenLoss:
    """Not a number, on one rank's first micro-batch."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def __call__(self, logits, batch):
        loss = logits.mean() * (torch.nan if self.broken else 1.0)
        return LossOutput(loss, {"loss": loss.detach()})


@every_backend
def test_a_step_without_finite_gradients_is_an_error_or_left_out(kind):
    path = tiny_model("qwen3")
    with pytest.raises(RanksFailed, match=r"--no-check-for-nan-in-loss-and-grad"):
        run_ranks(2, _break, kind, path, True)
    for stepped, unchanged in run_ranks(2, _break, kind, path, False):
        assert not stepped
        assert unchanged


def _break(kind, path, check):
    backend, _ = made(kind, path, check_for_nan_in_loss_and_grad=check)
    train(backend, [0])
    before = weights(backend)
    outcome = backend.train_step([micro_batch(sequences(2))], BrokenLoss(backend.parallel.dp_rank == 1))
    unchanged = same(before, weights(backend))
    train(backend, [1])
    backend.close()
    return outcome.stepped, unchanged
