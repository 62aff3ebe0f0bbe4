"""What a sleeping trainer holds really leaves memory, and comes back bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from support.backend_cases import NextTokenLoss, backend_args, log_probs, micro_batch, sequences
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model


def made(path, **flags):
    from miles.backends.fsdp_utils.backend import FSDPBackend

    backend = FSDPBackend(backend_args(path, **{"use_kl_loss": True, "offload_train_target": "disk"} | flags))
    backend.init()
    return backend


def train(backend, steps):
    batches = [micro_batch(sequences(4, seed=7))]
    return [backend.train_step(batches, NextTokenLoss(8)).grad_norm for _ in range(steps)]


def weights(backend):
    return {name: tensor.clone() for name, tensor in backend.hf_weights()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("level", [1, 2])
def test_everything_is_as_before_after_waking(tmp_path, world_size, level):
    path = tiny_model("qwen3", vocab=323)
    for kept, same, norms, awake_norms, sizes in run_ranks(world_size, _sleep_and_wake, path, tmp_path, level):
        assert kept
        assert same
        assert norms == awake_norms
        assert len(sizes[0]) == level
        assert min(sizes[0]) > 10_000
        assert sizes[1] == []
    assert list(tmp_path.iterdir()) == [], "files without a name leave nothing, however a rank ends"


def _sleep_and_wake(path, directory, level):
    samples = [micro_batch(sequences(4))]
    through = made(path)
    train(through, 2)
    norms, final = train(through, 2), weights(through)
    backend = made(path, offload_train_disk_dir=str(directory), offload_train_disk_chunk_mb=1)
    train(backend, 2)
    ref = backend.forward_only(samples, log_probs, model="ref")[0]
    backend.sleep(1)
    kept = weights(backend) is not None
    backend.sleep(level)
    sizes = [_nameless_files()]
    backend.wake_up()
    backend.wake_up()
    sizes.append(_nameless_files())
    same = all(map(torch.equal, ref, backend.forward_only(samples, log_probs, model="ref")[0]))
    awake_norms = train(backend, 2)
    found = weights(backend)
    same = same and all(torch.equal(final[name], found[name]) for name in final)
    backend.close()
    return kept, same, norms, awake_norms, sizes


def _nameless_files():
    """Sizes of this process's deleted files."""
    links = {int(name): os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}
    return [os.fstat(fd).st_size for fd, target in links.items() if target.endswith("(deleted)") and "/#" in target]


def _is_open(name):
    return Path(f"/proc/self/fd/{name}").is_symlink()


def test_what_sleeps_cannot_be_used(tmp_path):
    (codes,) = run_ranks(1, _use_while_asleep, tiny_model("qwen3"), tmp_path)
    assert codes == ["E-TRAIN-016"] * 5


def _use_while_asleep(path, directory):
    from miles.backends.training_utils.sleeping import Asleep

    batches = [micro_batch(sequences(2))]
    backend = made(path, offload_train_disk_dir=str(directory))
    train(backend, 1)
    codes = []

    def refused(function):
        with pytest.raises(Asleep) as error:
            function()
        codes.append(error.value.code)

    backend.sleep(1)
    assert weights(backend)
    refused(lambda: train(backend, 1))
    refused(lambda: backend.save(Path(directory), rollout_id=0))
    backend.sleep(2)
    refused(lambda: weights(backend))
    refused(lambda: backend.forward_only(batches, log_probs))
    refused(lambda: backend.forward_only(batches, log_probs, model="ref"))
    backend.wake_up()
    train(backend, 1)
    backend.close()
    return codes


def test_memory_really_shrinks(tmp_path):
    path = tiny_model("qwen3", hidden=256, layers=4, vocab=8192)
    (numbers,) = run_ranks(1, _resident, path, tmp_path)
    size = numbers["parameters"]
    assert size > 15 << 20
    assert numbers["awake"] - numbers["level 1"] > 1.8 * size
    assert numbers["level 1"] - numbers["level 2"] > 1.8 * size
    assert numbers["awake again"] - numbers["level 2"] > 3.6 * size
    assert numbers["awake again"] < numbers["awake"] + 0.2 * size


def _resident(path, directory):
    def resident():
        """Memory that this process holds, also what the machine has swapped out."""
        info = psutil.Process().memory_full_info()
        return info.rss + info.swap

    backend = made(path, offload_train_disk_dir=str(directory))
    train(backend, 1)
    size = sum(tensor.nbytes for _, tensor in backend.hf_weights())
    numbers = {"parameters": size, "awake": resident()}
    for level in (1, 2):
        backend.sleep(level)
        numbers[f"level {level}"] = resident()
    backend.wake_up()
    numbers["awake again"] = resident()
    backend.close()
    return numbers


def test_on_a_cpu_the_target_cpu_moves_nothing():
    (same,) = run_ranks(1, _stay, tiny_model("qwen3"))
    assert same


def _stay(path):
    backend = made(path, offload_train_target="cpu")
    train(backend, 1)
    before = weights(backend)
    backend.sleep(2)
    kept = all(shard.local.untyped_storage().nbytes() for shard in backend._trained().shards)
    backend.wake_up()
    found = weights(backend)
    return kept and all(torch.equal(before[name], found[name]) for name in before)


def test_a_disk_that_cannot_be_written_to_is_an_error_and_nothing_is_lost(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(RanksFailed, match=r"could not be written to[\s\S]*--offload-train-disk-dir[\s\S]*E-TRAIN-015"):
        run_ranks(1, _sleep_in, tiny_model("qwen3"), blocked / "here", False)
    assert run_ranks(1, _sleep_in, tiny_model("qwen3"), blocked / "here", True) == [True]


def _sleep_in(path, directory, catch):
    from miles.backends.training_utils.storages import CannotSleep

    backend = made(path, offload_train_disk_dir=str(directory))
    train(backend, 1)
    before = weights(backend)
    try:
        backend.sleep(2)
    except CannotSleep:
        if not catch:
            raise
    found = weights(backend)
    return all(torch.equal(before[name], found[name]) for name in before)
