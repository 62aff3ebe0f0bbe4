"""A rollout trained through a real backend gives the numbers and the weights of a plain implementation on the Hugging
Face model: GRPO with two steps, so that the second sees ratios that are not 1."""

import os
import resource
import signal

import pytest
import torch
from support.plain_losses import assert_close
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, plain, trained

from miles.backends.checkpoint_layout import TRACKER
from miles.backends.training_utils.checkpoints import CannotSave, commit_checkpoint

pytestmark = pytest.mark.full
LAYOUTS = [
    ("megatron", 1, 1, True), ("megatron", 2, 1, True), ("megatron", 2, 2, True), ("megatron", 2, 1, False),
    ("fsdp", 1, 1, True), ("fsdp", 2, 1, True), ("fsdp", 2, 1, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """By whether micro-batches are dynamic; if not, losses are per token."""
    path, found = tiny_model("qwen3"), {}
    for dynamic in (True, False):
        changed = {"use_dynamic_batch_size": dynamic, "micro_batch_size": 2, "calculate_per_token_loss": not dynamic}
        found[dynamic] = (path, changed, *run_ranks(1, plain, path, changed, 7, distributed=False)[0])
    return found


@pytest.mark.parametrize(("kind", "world", "tp", "dynamic"), LAYOUTS)
def test_a_rollout_gives_the_loss_and_the_weights_of_the_formula(expected, kind, world, tp, dynamic):
    path, changed, means, weights = expected[dynamic]
    on_ranks = changed | {"dp_size": world // tp, "tensor_model_parallel_size": tp}
    for metrics, found in run_ranks(world, trained, path, kind, on_ranks, 7):
        assert_close(metrics, means, (kind, world, tp))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_a_last_step_that_is_smaller_than_the_ranks_are_many_counts_as_it_should(kind):
    """``--allow-partial-train-step``: seven samples, then one, which leaves a rank without any."""
    path = tiny_model("qwen3")
    changed = {"use_dynamic_batch_size": True, "global_batch_size": 7, "allow_partial_train_step": True}
    means, weights = run_ranks(1, plain, path, changed, 0, distributed=False)[0]
    for metrics, found in run_ranks(2, trained, path, kind, changed | {"dp_size": 2}, 0):
        assert_close(metrics, means, kind)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=name)


def saved_with_a_limit(path, kind, root):
    """A checkpoint that fits, then one whose files may not grow on rank 1."""
    args = args_of(path, kind, dp_size=2, optimizer="adam")
    backend = backend_of(kind, args)
    backend.init()

    def save(rollout_id):
        commit_checkpoint(root, rollout_id, lambda place: backend.save(place, rollout_id=rollout_id), backend.device)

    save(0)
    before = contents(root)
    if backend.parallel.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save(1)
    except CannotSave as error:
        return str(error), contents(root) == before, sorted(os.listdir(root))
    return "saved", False, []


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["megatron", "fsdp"])
def test_a_rank_that_cannot_write_ends_the_save_of_all_and_changes_nothing(kind, tmp_path):
    answers = run_ranks(2, saved_with_a_limit, tiny_model("qwen3"), kind, tmp_path / "checkpoints")
    for text, unchanged, names in answers:
        assert "iter_0000001 could not be written" in text
        assert "those before are untouched" in text
        assert unchanged
        assert names == ["iter_0000000", TRACKER]
