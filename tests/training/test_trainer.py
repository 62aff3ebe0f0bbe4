"""The trainer as an actor: over a real controller, agent and store, with a backend of three matrices."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from support.cluster import error_of, real_cluster
from support.plain_losses import flags, plain_log_probs, plain_loss, random_train_data, tiny_model_of
from support.store_actors import Keeper
from support.tiny_backend import tiny_parameters

from miles.backends.checkpoint_layout import TRACKER
from miles.backends.training_utils.checkpoints import CannotSave
from miles.backends.training_utils.log_utils import NotFinite
from miles.utils.train_data import split_train_data

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.full]
TESTS = Path(__file__).parents[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    env = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    async with real_cluster(tmp_path_factory.mktemp("run"), env={**os.environ, **env}) as cluster:
        cluster.keeper = await cluster.controller.spawn("keeper", Keeper)
        yield cluster


def config_of(directory, **changed):
    directory.mkdir(exist_ok=True)
    places = {"save": str(directory / "checkpoints"), "load": str(directory / "checkpoints"), "run_dir": str(directory)}
    return {**vars(flags()), **places, "train_backend": "tiny", **changed}


@asynccontextmanager
async def trainer_of(cluster, config, size):
    mesh = await cluster.controller.spawn(
        "trainer",
        "support.tiny_backend:TinyTrainer",
        config,
        dims={"gpus": size},
        rank_env=lambda rank: {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)},
        preload=("support.tiny_backend",),
        start_timeout_s=60.0,
    )
    try:
        host, port = await mesh.slice(gpus=0).rendezvous.call_one()
        answers = await mesh.init.call(host, port)
        mesh.start_rollout_id = answers.at(gpus=0)["start_rollout_id"]
        yield mesh
    finally:
        await mesh.stop()


async def refs_of(cluster, config, seed):
    parts = split_train_data(flags(**config), random_train_data(seed))
    return await cluster.keeper.put_parts.call_one(parts)


def assert_equal(found, wanted):
    for rank, values in wanted.items():
        for name, value in values.items():
            assert torch.equal(found.at(**rank)[name], value), (rank, name)


async def test_a_rollout_is_trained_and_told_in_numbers(cluster, tmp_path):
    config = config_of(tmp_path, dp_size=2, save_debug_train_data=str(tmp_path / "dump_{rollout_id}_{rank}.pt"))
    async with trainer_of(cluster, config, 2) as trainer:
        assert trainer.start_rollout_id == 0
        metrics = await trainer.train.call(0, await refs_of(cluster, config, 1))
        first, second = metrics.at(gpus=0), metrics.at(gpus=1)
        progress = await trainer.slice(gpus=0).progress.call_one()
    names = {name for name in first if not name.startswith("perf/")}
    assert {name: first[name] for name in names} == {name: second[name] for name in names}
    assert first["train/ppo_kl"] == pytest.approx(0.0, abs=0.5)
    assert first["train/step"] == 1.0
    assert first["train/grad_norm"] > 0
    assert first["train/lr-pg_0"] == 0.01
    assert first["rollout/rewards"] == pytest.approx(sum(random_train_data(1)["rewards"]) / 8)
    for name in ("log_probs", "ref_log_probs", "rollout_log_probs", "advantages", "response_lengths"):
        assert f"rollout/{name}" in first
    for timer in ("data_preprocess", "ref_log_probs", "log_probs", "actor_train", "train"):
        assert first[f"perf/{timer}_time"] > 0
    assert first["perf/actor_train_tok_per_s"] > 0
    assert progress == {"phase": "idle", "rollout_id": 0, "step": 1, "num_steps": 2}
    dump = torch.load(tmp_path / "dump_0_1.pt")
    assert dump["rollout_id"] == 0
    assert (dump["rank"], dump["cp_rank"], dump["cp_size"], dump["qkv_format"]) == (1, 0, 1, "thd")
    assert len(dump["rollout_data"]["tokens"]) == len(dump["rollout_data"]["advantages"])


async def test_the_first_step_is_the_one_that_the_formula_gives(cluster, tmp_path):
    """With the trainer's own old and reference log-probabilities: the ratio is 1 and the reference is the model."""
    config = config_of(tmp_path, dp_size=1, tp_size=2, global_batch_size=8, rollout_temperature=1.0)
    data = random_train_data(3)
    async with trainer_of(cluster, config, 2) as trainer:
        metrics = (await trainer.train.call(0, await refs_of(cluster, config, 3))).at(gpus=0)
    args = flags(**config)
    parameters = {n: v.requires_grad_() for n, v in tiny_parameters(args.tiny_vocab, args.tiny_hidden, 3).items()}
    model = tiny_model_of(parameters)
    own = plain_log_probs(args, model, data)
    plain = plain_loss(args, model, {**data, "log_probs": own, "ref_log_probs": own}, range(8))
    plain["loss"].backward()
    norm = sum(float(p.grad.square().sum()) for p in parameters.values()) ** 0.5
    assert metrics["train/loss"] == pytest.approx(float(plain["loss"].detach()), abs=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["train/ppo_kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["train/pg_clipfrac"] == 0.0


async def test_what_is_saved_goes_on_where_it_was(cluster, tmp_path):
    config = config_of(tmp_path, dp_size=2)
    async with trainer_of(cluster, config, 2) as trainer:
        await trainer.train.call(0, await refs_of(cluster, config, 1))
        paths = await trainer.save.call(0)
        await trainer.train.call(1, await refs_of(cluster, config, 2))
        wanted = dict((await trainer.weights.call()).items())
    assert paths.at(gpus=0) == str(tmp_path / "checkpoints" / "iter_0000000")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["iter_0000000", TRACKER]
    async with trainer_of(cluster, config, 2) as trainer:
        assert trainer.start_rollout_id == 1
        await trainer.train.call(1, await refs_of(cluster, config, 2))
        assert_equal(await trainer.weights.call(), wanted)


async def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_else(cluster, tmp_path):
    config = config_of(tmp_path, dp_size=2)
    root = tmp_path / "checkpoints"
    async with trainer_of(cluster, config, 2) as trainer:
        await trainer.train.call(0, await refs_of(cluster, config, 1))
        await trainer.save.call(0)
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        await trainer.train.call(1, await refs_of(cluster, config, 2))
        # Files of rank 1 may not grow beyond 1000 bytes: what a quota or a full disk does to it.
        await trainer.slice(gpus=1).limit_files.call_one(1000)
        error = await error_of(trainer.save.call(1), CannotSave)
        assert "the disk is full" in str(error)
        assert "rank 1" in str(error)
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
        assert sorted(os.listdir(root)) == ["iter_0000000", TRACKER]
        await trainer.slice(gpus=1).limit_files.call_one(-1)
        await trainer.save.call(1)
    assert (root / TRACKER).read_text() == "1"


async def test_a_checkpoint_of_the_same_name_is_replaced(cluster, tmp_path):
    config = config_of(tmp_path, dp_size=1)
    async with trainer_of(cluster, config, 1) as trainer:
        await trainer.save.call(4)
        old = (tmp_path / "checkpoints/iter_0000004/rank_0.pt").read_bytes()
        await trainer.train.call(0, await refs_of(cluster, config, 1))
        await trainer.save.call(4)
    assert (tmp_path / "checkpoints/iter_0000004/rank_0.pt").read_bytes() != old
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["iter_0000004", TRACKER]


async def test_sleep_gives_memory_back_and_changes_no_number(cluster, tmp_path):
    size = 400_000
    config = config_of(
        tmp_path, dp_size=1, tiny_vocab=size, tiny_hidden=16, max_tokens_per_gpu=4, rollout_temperature=1.0
    )
    async with trainer_of(cluster, config, 1) as trainer:
        data = {
            "tokens": [[1, 2, 3, 4]] * 4, "response_lengths": [2] * 4, "loss_masks": [[1, 1]] * 4,
            "rewards": [1.0, -1.0, 0.5, 0.0],
        }  # fmt: skip
        refs = await cluster.keeper.put_parts.call_one(split_train_data(flags(**config), data))
        await trainer.train.call(0, refs)
        before = dict((await trainer.weights.call()).items())
        first = (await trainer.sleep.call(1)).at(gpus=0)
        second = (await trainer.sleep.call(2)).at(gpus=0)
        woken = (await trainer.wake_up.call()).at(gpus=0)
        assert_equal(await trainer.weights.call(), before)
        metrics = (await trainer.train.call(1, refs)).at(gpus=0)
        await trainer.sleep.call(2)
        asleep = await trainer.train.call(2, refs)
    matrix = size * 16 * 4
    # Adam's two moments and the gradient of two large matrices; then the matrices themselves.
    assert first["rss_before"] - first["rss_after"] > 5 * matrix
    assert first["rss_after"] - second["rss_after"] > 1.5 * matrix
    assert woken["rss_after"] - woken["rss_before"] > 5 * matrix
    assert metrics["train/step"] == 1.0
    assert asleep.at(gpus=0)["perf/wake_up_time"] > 0


async def test_a_loss_that_is_not_finite_ends_the_run_with_the_numbers(cluster, tmp_path):
    config = config_of(tmp_path, dp_size=1)
    async with trainer_of(cluster, config, 1) as trainer:
        refs = await refs_of(cluster, config, 1)
        await trainer.poison.call()
        error = await error_of(trainer.train.call(0, refs), NotFinite)
    assert "rollout 0, step 0" in str(error)
    assert "--no-check-for-nan-in-loss-and-grad" in str(error)
