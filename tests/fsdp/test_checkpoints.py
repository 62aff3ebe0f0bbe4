"""A resumed run goes on bit for bit; any number of ranks loads what any other saved; what does not fit is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.backend_cases import NextTokenLoss, backend_args, log_probs, micro_batch, sequences, share
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model

from miles.backends.checkpoint_layout import FSDP_META
from miles.backends.fsdp_utils.checkpoint import is_checkpoint

COSINE = {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "min_lr": 1e-5}


def made(path, **flags):
    from miles.backends.fsdp_utils.backend import FSDPBackend

    backend = FSDPBackend(backend_args(path, **COSINE | flags))
    return backend, backend.init()


def train(backend, rollout_ids):
    """One step for each rollout. Returns what the steps showed."""
    shown = []
    for rollout_id in rollout_ids:
        samples = sequences(8, seed=rollout_id)
        mine = share(samples, backend.parallel.dp_rank, backend.parallel.dp_size)
        outcome = backend.train_step([micro_batch(mine[:2]), micro_batch(mine[2:])], NextTokenLoss(len(samples)))
        shown.append((outcome.grad_norm, outcome.learning_rate))
    return shown


def save(backend, root, rollout_id):
    """As the trainer does: a directory of its own first, the tracker last."""
    import torch.distributed as dist

    directory = Path(root) / f"iter_{rollout_id:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    backend.save(directory, rollout_id=rollout_id)
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(root) / "latest_checkpointed_iteration.txt").write_text(str(rollout_id))
    dist.barrier()


def weights(backend):
    return {name: tensor.clone() for name, tensor in backend.hf_weights()}


def draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def train_through(path, root):
    """Four steps, saved after two and after four; and what the rest of the run saw."""
    backend, start = made(path)
    shown = train(backend, range(start, 2))
    draws()
    save(backend, root, 1)
    later = train(backend, range(2, 4))
    numbers = draws()
    save(backend, root, 3)
    return shown + later, numbers, weights(backend)


def resume(path, root, steps=2, **flags):
    backend, start = made(path, load=str(root), **flags)
    loaded = weights(backend)
    shown = train(backend, range(start, start + steps))
    return start, shown, draws(), weights(backend), loaded


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_steps_and_resume_and_two_equal_four(tmp_path, world_size):
    path = tiny_model("qwen3", vocab=323)
    through = run_ranks(world_size, train_through, path, tmp_path)
    resumed = run_ranks(world_size, _resume_at_1, path, tmp_path)
    for (shown, numbers, final), (start, later, later_numbers, later_final, _) in zip(through, resumed, strict=True):
        assert start == 2
        assert later == shown[2:]
        assert later_numbers == numbers
        assert all(torch.equal(final[name], later_final[name]) for name in final)
    if world_size == 2:
        assert through[0][1] != through[1][1], "each rank has generators of its own"


def _resume_at_1(path, root):
    return resume(path, root, ckpt_step=1)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_alike(tmp_path, saved, loaded):
    path = tiny_model("qwen3", vocab=323)
    shown, _, final = run_ranks(saved, train_through, path, tmp_path)[0]
    for start, later, _, later_final, _ in run_ranks(loaded, _resume_at_1, path, tmp_path):
        assert start == 2
        assert torch.tensor(later) == pytest.approx(torch.tensor(shown[2:]), rel=1e-5)
        for name, weight in final.items():
            torch.testing.assert_close(later_final[name], weight, atol=1e-5, rtol=0, msg=name)


def test_parts_of_a_checkpoint_can_be_left_out(tmp_path):
    path = tiny_model("qwen3", vocab=323)
    ((_, _, final),) = run_ranks(1, train_through, path, tmp_path)
    ((start, rates, loaded), (fine_start, fine_rates, fine_loaded)) = run_ranks(1, _leave_out, path, tmp_path)[0]
    assert (start, fine_start) == (4, 0)
    assert rates[0][1] == fine_rates[0][1] == 0.0, "both schedules begin anew, warming up"
    for name, weight in final.items():
        assert torch.equal(loaded[name], weight)
        assert torch.equal(fine_loaded[name], weight)


def _leave_out(path, root):
    found = []
    for flags in ({"no_load_optim": True, "no_load_rng": True}, {"finetune": True}):
        start, shown, _, _, loaded = resume(path, root, steps=1, **flags)
        found.append((start, shown, loaded))
    return found


def test_what_is_not_saved_is_named_when_it_is_missing(tmp_path):
    path = tiny_model("qwen3")
    run_ranks(1, _save_weights_only, path, tmp_path)
    ((_, _, _, _, loaded),) = run_ranks(1, _resume_without, path, tmp_path)
    assert loaded
    with pytest.raises(RanksFailed, match=r"holds no optimizer state[\s\S]*--no-load-optim[\s\S]*E-FSDP-003"):
        run_ranks(1, resume, path, tmp_path)


def _save_weights_only(path, root):
    backend, _ = made(path, no_save_optim=True, no_save_rng=True)
    save(backend, root, 0)
    assert sorted(entry.name for entry in (Path(root) / "iter_0000000").iterdir()) == ["meta.json", "model"]


def _resume_without(path, root):
    return resume(path, root, no_load_optim=True, no_load_rng=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_ranks(1, _save_weights_only, tiny_model("qwen3"), tmp_path)
    with pytest.raises(RanksFailed, match="does not fit this model"):
        run_ranks(1, _resume_without, tiny_model("qwen3", hidden=48), tmp_path)
    with pytest.raises(RanksFailed, match=r"no checkpoint of rollout 7[\s\S]*there is: iter_0000000"):
        run_ranks(1, _resume_at_7, tiny_model("qwen3"), tmp_path)
    meta = tmp_path / "iter_0000000" / "meta.json"
    meta.write_text(json.dumps({"format": 99}))
    with pytest.raises(RanksFailed, match=r"meta\.json cannot be read[\s\S]*E-FSDP-003"):
        run_ranks(1, _resume_without, tiny_model("qwen3"), tmp_path)


def _resume_at_7(path, root):
    return resume(path, root, ckpt_step=7)


def test_an_empty_load_is_a_fresh_start_from_the_reference_weights(tmp_path):
    base, other = tiny_model("qwen3"), tiny_model("qwen3", seed=5, shards=2)
    start, shown, same = run_ranks(1, _fresh, base, other, tmp_path)[0]
    assert start == 0
    assert same
    assert shown[0] == pytest.approx(shown[1], abs=1e-6)


def _fresh(base, other, root):
    """The actor begins as the reference, which stays when the actor learns."""
    samples = [micro_batch(sequences(4))]
    backend, start = made(base, load=str(root / "none"), ref_load=str(other), use_kl_loss=True, lr_warmup_iters=0)
    plain, _ = made(other)
    wanted, found = weights(plain), weights(backend)
    before = torch.cat(backend.forward_only(samples, log_probs, model="ref")[0])
    train(backend, [0])
    after = torch.cat(backend.forward_only(samples, log_probs, model="ref")[0])
    moved = torch.cat(backend.forward_only(samples, log_probs)[0])
    assert (moved - after).abs().max() > 1e-4
    return start, (before.tolist(), after.tolist()), all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_reference_weights_come_from_a_checkpoint_of_this_backend_too_but_not_from_torch_dist(tmp_path):
    path = tiny_model("qwen3", vocab=323)
    ((_, _, final),) = run_ranks(1, train_through, path, tmp_path)
    (found,) = run_ranks(2, _from_reference, path, tmp_path)[:1]
    assert all(torch.equal(final[name], found[name]) for name in final)
    foreign = tmp_path / "foreign"
    shutil.copytree(tmp_path / "iter_0000003" / "model", foreign / "iter_0000003")
    (foreign / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(RanksFailed, match=r"--ref-load [\s\S]*torch_dist[\s\S]*miles convert"):
        run_ranks(1, _from_reference, path, foreign)


def _from_reference(path, root):
    return weights(made(path, ref_load=str(root))[0])


def test_a_step_without_a_tracker_file_beside_it_is_a_checkpoint(tmp_path):
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003" / FSDP_META).touch()
    assert not is_checkpoint(tmp_path)
    assert is_checkpoint(tmp_path, 3)
    assert not is_checkpoint(tmp_path, 4)
