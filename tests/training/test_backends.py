"""A rollout trained through a real backend gives the numbers and the weights of a plain implementation on the Hugging
Face model: GRPO with two steps, so that the second sees ratios that are not 1."""

import os
import resource
import signal
from argparse import Namespace

import pytest
import torch
from support import backend_cases, megatron_cases
from support.hf_reference import load_hf_model
from support.plain_losses import assert_close, flags, plain_log_probs, plain_loss, random_train_data
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from miles.backends.checkpoint_layout import TRACKER
from miles.backends.training_utils.checkpoints import CannotSave, commit_checkpoint
from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

pytestmark = pytest.mark.full
GRADIENT_DESCENT = {"optimizer": "sgd", "sgd_momentum": 0.0, "lr": 0.1, "weight_decay": 0.0, "clip_grad": 0.0}


def args_of(path, kind, **changed):
    cases = megatron_cases if kind == "megatron" else backend_cases
    known = vars(cases.backend_args(path)) | {"hf_config": vars(megatron_cases.backend_args(path))["hf_config"]}
    known |= {"ref_load": str(path), "num_steps_per_rollout": 2}
    return Namespace(**known | vars(flags()) | GRADIENT_DESCENT | {"seed": 1234} | changed)


def backend_of(kind, args):
    if kind == "megatron":
        return megatron_cases.MegatronBackend(args)
    from miles.backends.fsdp_utils.backend import FSDPBackend

    return FSDPBackend(args)


def trained(path, kind, changed, seed):
    args = args_of(path, kind, **changed)
    backend = backend_of(kind, args)
    assert backend.init() == 0
    parts = split_train_data(args, data_of(seed))
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    metrics = trainer.train(0, lambda: parts[backend.parallel.dp_rank])
    return metrics, {name: tensor.clone() for name, tensor in backend.hf_weights()}


def data_of(seed):
    """What the trainer computes itself is left out."""
    data = random_train_data(seed, vocab=300)
    return {name: values for name, values in data.items() if name not in ("log_probs", "ref_log_probs")}


def plain(path, changed, seed):
    args, data = args_of(path, "fsdp", **changed), data_of(seed)
    module = load_hf_model(path)

    def model(tokens):
        return module(tokens[None]).logits[0].float()

    own = plain_log_probs(args, model, data)
    data |= {"log_probs": own, "ref_log_probs": own}
    steps = []
    for first in (0, 4):
        module.zero_grad()
        metrics = plain_loss(args, model, data, range(first, first + 4))
        metrics["loss"].backward()
        norm = sum(float(p.grad.square().sum()) for p in module.parameters()) ** 0.5
        steps.append({name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()})
        steps[-1]["grad_norm"] = norm
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(args.lr * parameter.grad)
    means = {f"train/{name}": (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    return means, {name: parameter.detach() for name, parameter in module.named_parameters()}


LAYOUTS = [
    ("megatron", 1, 1, True), ("megatron", 2, 1, True), ("megatron", 2, 2, True), ("megatron", 2, 1, False),
    ("fsdp", 1, 1, True), ("fsdp", 2, 1, True), ("fsdp", 2, 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "world", "tp", "dynamic"), LAYOUTS)
def test_a_rollout_gives_the_loss_and_the_weights_of_the_formula(kind, world, tp, dynamic):
    path = tiny_model("qwen3")
    changed = {"use_dynamic_batch_size": dynamic, "micro_batch_size": 2, "calculate_per_token_loss": not dynamic}
    means, weights = run_ranks(1, plain, path, changed, 7, distributed=False)[0]
    on_ranks = changed | {"dp_size": world // tp, "tensor_model_parallel_size": tp}
    for metrics, found in run_ranks(world, trained, path, kind, on_ranks, 7):
        assert_close(metrics, means, (kind, world, tp))
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
