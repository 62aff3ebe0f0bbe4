"""``--deterministic-mode``: the same recorded rollouts and the same ``--seed`` give the same weights, bit for bit, in
another set of processes; and what is drawn in training (dropout) follows from the seed."""

import hashlib

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of

from miles.backends.trainer import _seed
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

BF16 = {"params_dtype": "bfloat16"}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LAYOUTS = [
    ("megatron", {"dp_size": 2} | BF16),
    ("fsdp", {"dp_size": 2} | BF16),
    pytest.param("megatron", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.full),
    pytest.param("megatron", {"context_parallel_size": 2}, marks=pytest.mark.long),
    pytest.param("megatron", {"pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
]


def checksum(path, kind, flags):
    """Of weights and metrics after three recorded rollouts."""
    known = {"deterministic_mode": True, "optimizer": "adam", "lr": 1e-2, "clip_grad": 1.0, "use_kl_loss": False}
    args = args_of(path, kind, **known | flags)
    _seed(args.seed)
    backend = backend_of(kind, args)
    backend.init()
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    found = hashlib.sha256()
    for rollout_id in range(3):
        parts = split_train_data(args, data_of(rollout_id))
        metrics = trainer.train(rollout_id, lambda parts=parts: parts[backend.parallel.dp_rank])
        found.update(repr([metrics["train/loss"], metrics["train/grad_norm"]]).encode())
    for name, tensor in backend.hf_weights():
        found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    backend.close()
    return found.hexdigest()


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_the_same_rollouts_and_seed_give_the_same_weights_bit_for_bit(kind, layout):
    path = tiny_model("qwen3")
    once, again = (run_ranks(2, checksum, path, kind, layout) for _ in range(2))
    assert once == again
    assert len(set(once)) == 1


def test_what_is_drawn_in_training_follows_from_the_seed():
    path = tiny_model("qwen3")
    draws = {"dp_size": 2, **DROPOUT}
    once, again, other = (
        run_ranks(2, checksum, path, "megatron", draws | {"seed": seed})[0] for seed in (1234, 1234, 99)
    )
    assert once == again != other
