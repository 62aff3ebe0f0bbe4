"""A backend that sleeps gives its memory back, and wakes up as it was."""

import os
import re
from pathlib import Path

import psutil
import pytest
import torch
from support.megatron_cases import TokenLogProbs, make_backend, micro_batch, sequences, train_one, weights_of
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from miles.backends.training_utils.sleeping import Asleep
from miles.backends.training_utils.storages import CannotSleep

MIB = 1 << 20


def held():
    """Memory that this process holds, also what the machine has swapped out."""
    info = psutil.Process().memory_full_info()
    return info.rss + info.swap


def state_of(backend):
    """All of parameters, moments and what is computed with them."""
    tensors = {f"weight {name}": value for name, value in weights_of(backend).items()}
    for part in backend.optimizer.chained_optimizers:
        for g, group in enumerate(part.optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                tensors[f"main {g} {p}"] = parameter.detach().clone()
                tensors |= {f"{key} {g} {p}": v.clone() for key, v in part.optimizer.state[parameter].items()}
    return tensors


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def sleep_and_wake(path, directory, changed, level):
    """Beside a run that never sleeps."""
    backend = make_backend(path, offload_train_disk_dir=str(directory), **changed)
    train_one(backend, 0)
    before = state_of(backend)
    next(backend.model.parameters()).detach().view(
        torch.uint8
    ).numpy()  # as a weight update may: the storage can be resized no more
    awake = held()
    if level == 3:  # the order of a colocated iteration
        backend.sleep(1)
        assert_same(
            {f"weight {name}": value for name, value in weights_of(backend).items()},
            {name: value for name, value in before.items() if name.startswith("weight")},
        )
    backend.sleep(min(level, 2))
    backend.sleep(min(level, 2))  # already
    asleep = held()
    opened = open_files(directory)
    names = os.listdir(directory) if Path(directory).exists() else []
    backend.wake_up()
    backend.wake_up()
    assert_same(state_of(backend), before)
    train_one(backend, 1)
    return weights_of(backend), awake, asleep, names, opened, open_files(directory)


def open_files(directory):
    """How many that lie in the directory, with or without a name."""
    return sum(_target(fd).startswith(str(directory)) for fd in os.listdir("/proc/self/fd"))


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def never_sleeps(path, changed):
    backend = make_backend(path, **changed)
    for number in range(2):
        train_one(backend, number)
    return weights_of(backend)


SGD = {"optimizer": "sgd", "lr": 1e-2}
BF16 = {"params_dtype": "bfloat16", "use_kl_loss": True}
CASES = [(1, {}, 1), (1, {}, 2), (1, BF16, 3), (1, SGD, 3)]
SPREAD = ({}, {"tensor_model_parallel_size": 2}, {"expert_model_parallel_size": 2})
CASES += [pytest.param(2, changed, 3, marks=pytest.mark.full) for changed in SPREAD]


@pytest.mark.parametrize(("world", "changed", "level"), CASES, ids=str)
def test_it_wakes_up_bit_for_bit_and_trains_on(tmp_path, world, changed, level):
    path = tiny_model("qwen3_moe" if "expert_model_parallel_size" in changed else "qwen3")
    expected = run_ranks(world, never_sleeps, path, changed)[0]
    for result in run_ranks(world, sleep_and_wake, path, tmp_path / "away", changed, level):
        assert_same(result[0], expected)
        names, opened, left = result[3:]
        assert names == []  # the files have no names that anything could leave behind
        assert opened > 0
        assert left == 0


@pytest.mark.full
def test_memory_really_leaves(tmp_path):
    # 14 million parameters of 4 bytes: as many again for gradients, two times for moments.
    path = tiny_model("qwen3", hidden=512, ffn=1536, layers=4, heads=8, vocab=320)
    size = (path / "model.safetensors").stat().st_size
    for level, parts in ((1, 3), (2, 4)):
        _, awake, asleep, *_ = run_ranks(1, sleep_and_wake, path, tmp_path, {}, level)[0]
        assert awake - asleep > 0.9 * parts * size, f"{(awake - asleep) / MIB:.0f} of {parts * size / MIB:.0f} MiB"


def weights_of_parameters(backend):
    return torch.cat([parameter.detach().flatten() for parameter in backend.model.parameters()])


def stays(path):
    backend = make_backend(path, offload_train_target="cpu", offload_train_disk_dir="/nonexistent")
    train_one(backend, 0)
    before = state_of(backend)
    with_log, values = _Log(), weights_of_parameters(backend)
    backend.sleep(2)
    kept = torch.equal(weights_of_parameters(backend), values)
    backend.wake_up()
    assert_same(state_of(backend), before)
    return kept, with_log.lines


class _Log:
    """What the module logs from now on."""

    def __init__(self):
        import logging

        self.lines = []
        logger = logging.getLogger("miles.backends.training_utils.storages")
        logger.setLevel(logging.INFO)
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())
        logger.addHandler(handler)


def test_the_target_cpu_moves_nothing_on_a_cpu_and_says_so():
    kept, lines = run_ranks(1, stays, tiny_model("qwen3"))[0]
    assert kept
    assert any(re.search("is in CPU memory already and stays there", line) for line in lines)


def asks_while_asleep(path, directory):
    backend = make_backend(path, offload_train_disk_dir=str(directory))
    refused = []
    for level in (1, 2):
        backend.sleep(level)
        for ask in (
            lambda: train_one(backend, 0),
            lambda: backend.forward_only([micro_batch(sequences())], TokenLogProbs(backend.parallel)),
            backend.hf_weights,
            lambda: backend.save(directory, rollout_id=0),
        ):
            try:
                ask()
            except Asleep as error:
                refused.append((level, error.what))
    return refused


def test_what_needs_sleeping_memory_is_refused(tmp_path):
    assert run_ranks(1, asks_while_asleep, tiny_model("qwen3"), tmp_path)[0] == [
        (1, "cannot train while asleep at level 1"),
        (1, "cannot save while asleep at level 1"),
        (2, "cannot train while asleep at level 2"),
        (2, "cannot compute while asleep at level 2"),
        (2, "cannot hand on weights while asleep at level 2"),
        (2, "cannot save while asleep at level 2"),
    ]


def sleeps_where_it_cannot(path, directory):
    backend = make_backend(path, offload_train_disk_dir=str(directory))
    train_one(backend, 0)
    before = state_of(backend)
    try:
        backend.sleep(2)
    except CannotSleep as error:
        told = str(error)
    assert_same(state_of(backend), before)
    train_one(backend, 1)
    return told


def test_a_directory_that_cannot_be_written_leaves_all_as_it_was(tmp_path):
    (tmp_path / "file").write_text("no directory")
    told = run_ranks(1, sleeps_where_it_cannot, tiny_model("qwen3"), tmp_path / "file")[0]
    assert "--offload-train-disk-dir" in told
    assert "E-TRAIN-015" in told
