"""Which checkpoint is loaded, what of it, and what is refused."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.megatron_cases import (
    TokenLogProbs,
    make_backend,
    micro_batch,
    save_backend,
    sequences,
    train_one,
    weights_of,
)
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model

from miles.backends.checkpoint_layout import TRACKER, DamagedCheckpoint, NoSuchCheckpoint, find_checkpoint
from miles.backends.megatron_utils.checkpoint_files import check_complete
from miles.backends.megatron_utils.errors import CannotWriteCheckpoint


def saved_run(path, root, changed, ids):
    backend = make_backend(path, **changed)
    weights = {}
    for number in ids:
        train_one(backend, number)
        save_backend(backend, root, number)
        weights[number] = weights_of(backend)
    return weights


def loaded(path, changed):
    backend = make_backend(path, **changed)
    moments = [
        value
        for part in backend.optimizer.chained_optimizers
        for value in part.state_dict()["optimizer"]["param_groups"]
    ]
    return backend.start, backend.scheduler.num_steps, moments[0].get("step", 0), weights_of(backend)


def load(path, **changed):
    return run_ranks(1, loaded, path, changed)[0]


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Root of two checkpoints, and the weights of each."""
    root = tmp_path_factory.mktemp("run")
    return root, run_ranks(1, saved_run, model, root, {}, [0, 1])[0]


def test_the_newest_is_loaded(model, run):
    start, steps, adam_steps, weights = load(model, load=str(run[0]))
    assert (start, steps, adam_steps) == (2, 2, 2)
    assert equal(weights, run[1][1])


def test_ckpt_step_chooses(model, run):
    start, steps, _, weights = load(model, load=str(run[0]), ckpt_step=0)
    assert (start, steps) == (1, 1)
    assert equal(weights, run[1][0])


def test_no_load_optim_begins_with_a_fresh_optimizer(model, run):
    start, steps, adam_steps, weights = load(model, load=str(run[0]), no_load_optim=True)
    assert (start, steps, adam_steps) == (2, 0, 0)
    assert equal(weights, run[1][1])


def test_finetune_takes_weights_only(model, run):
    start, steps, adam_steps, weights = load(model, load=str(run[0]), finetune=True)
    assert (start, steps, adam_steps) == (0, 0, 0)
    assert equal(weights, run[1][1])


def test_a_load_directory_without_a_checkpoint_is_a_fresh_start(model, tmp_path):
    start, steps, _, weights = load(model, load=str(tmp_path / "nothing"))
    assert (start, steps) == (0, 0)
    assert equal(weights, load(model)[3])


@pytest.mark.parametrize("kind", ["torch_dist", "hf"])
def test_ref_load_gives_the_first_weights(model, run, kind):
    other = tiny_model("qwen3", seed=5)
    root = run[0] if kind == "torch_dist" else other
    weights = load(model, ref_load=str(root))[3]
    assert equal(weights, run[1][1] if kind == "torch_dist" else load(other)[3])


def reference_log_probs(path, changed):
    backend = make_backend(path, use_kl_loss=True, **changed)
    first, batches = TokenLogProbs(backend.parallel), [micro_batch(sequences())]
    before = backend.forward_only(batches, first, model="ref")[0]
    train_one(backend, 0)
    after = backend.forward_only(batches, first, model="ref")[0]
    actor = backend.forward_only(batches, first)[0]
    return [torch.cat(values) for values in (before, after, actor)]


def actor_log_probs(path, changed):
    backend = make_backend(path, **changed)
    return torch.cat(backend.forward_only([micro_batch(sequences())], TokenLogProbs(backend.parallel))[0])


def test_the_reference_is_that_of_ref_load_and_is_not_trained(model, run):
    before, after, actor = run_ranks(1, reference_log_probs, model, {"ref_load": str(run[0]), "load": None})[0]
    expected = run_ranks(1, actor_log_probs, model, {"load": str(run[0])})[0]
    torch.testing.assert_close(before, expected)
    assert torch.equal(before, after)
    assert not torch.equal(actor, after)


def without_optimizer(path, root):
    saved_run(path, root, {"no_save_optim": True}, [0])


def test_a_checkpoint_without_optimizer_is_loaded_only_with_no_load_optim(model, tmp_path):
    run_ranks(1, without_optimizer, model, tmp_path)
    with pytest.raises(RanksFailed, match=r"(?s)no state of the optimizer adam.*no-load-optim.*E-CKPT-003"):
        load(model, load=str(tmp_path))
    assert load(model, load=str(tmp_path), no_load_optim=True)[0] == 1


def test_a_checkpoint_of_another_model_is_refused(run):
    with pytest.raises(RanksFailed, match=r"(?s)another model.*layers: 2 there, 3 wanted.*E-CKPT-003"):
        load(tiny_model("qwen3", layers=3), load=str(run[0]))


def test_a_step_that_is_not_there_is_refused(run):
    with pytest.raises(NoSuchCheckpoint, match=r"(?s)rollout 7.*iter_0000000, iter_0000001"):
        find_checkpoint(run[0], 7)


def test_a_tracker_that_names_what_is_not_there_is_refused(tmp_path):
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(DamagedCheckpoint, match="it says '12'; there are: none"):
        find_checkpoint(tmp_path)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run[0] / "iter_0000001", tmp_path / "copy"))


@pytest.mark.parametrize("name", ["metadata.json", "common.pt", ".metadata", "__0_0.distcp"])
def test_a_missing_file_is_named(copy, name):
    assert check_complete(copy)
    (copy / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"missing: {re.escape(name)}"):
        check_complete(copy)


def test_a_file_that_was_cut_off_is_named(copy):
    with (copy / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedCheckpoint, match=r"too short: __0_0\.distcp has 1000 bytes of"):
        check_complete(copy)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_garbage_in_a_file_is_refused(model, copy, name):
    (copy / name).write_bytes(b"garbage")
    with pytest.raises(RanksFailed, match=f"(?s){name}.*E-CKPT-002"):
        load(model, load=str(copy))


def another_format(copy):
    (copy / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))


def test_another_format_is_refused(copy):
    another_format(copy)
    with pytest.raises(DamagedCheckpoint, match="made by 'zarr'"):
        check_complete(copy)


def save_with_little_room(path, root, limited_rank):
    backend = make_backend(path, tensor_model_parallel_size=2)
    train_one(backend, 0)
    if backend.parallel.rank == limited_rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        save_backend(backend, root, 0)
    except CannotWriteCheckpoint as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


@pytest.mark.parametrize("limited_rank", [0, 1])
def test_a_write_that_fails_on_one_rank_is_told_on_all(model, tmp_path, limited_rank):
    # A limit on the size of files fails in the same place as a disk that is full.
    told = run_ranks(2, save_with_little_room, model, tmp_path, limited_rank)
    assert all("could not be written" in text and "E-CKPT-004" in text for text in told)
    assert "File too large" in told[0], told[0]
    assert not (tmp_path / TRACKER).exists()


def next_random(path, changed):
    make_backend(path, **changed)
    return torch.rand(3)


def test_generators_are_taken_over_unless_told(model, tmp_path):
    run_ranks(1, saved_run, model, tmp_path, {}, [0])
    fresh = run_ranks(1, next_random, model, {})[0]
    taken = run_ranks(1, next_random, model, {"load": str(tmp_path)})[0]
    left = run_ranks(1, next_random, model, {"load": str(tmp_path), "no_load_rng": True})[0]
    assert torch.equal(left, fresh)
    assert not torch.equal(taken, fresh)
