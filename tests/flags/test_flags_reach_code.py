"""Honoured means: something reads it. For recomputation, which changes no number, also that it happens."""

import re
from pathlib import Path

import pytest
import torch
from support import backend_cases, megatron_cases
from support.plain_losses import flags, random_train_data
from support.ranks import run_ranks, warm_process
from support.tiny_models import tiny_model

from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.flags import table as flag_table
from miles.utils.train_data import split_train_data

ROOT = Path(flag_table.__file__).parents[1]
TABLES = set((ROOT / "flags").glob("group_*.py"))


def test_every_honoured_flag_is_read_by_code_or_by_a_rule():
    sources = [path for root in (ROOT, ROOT.parent / "launcher") for path in root.rglob("*.py") if path not in TABLES]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
    unread = [
        flag.name
        for flag in flag_table.table().flags
        if flag.only is None and not flag.older and flag.dest not in words
    ]
    assert unread == []


@pytest.fixture(scope="module")
def ranks():
    with warm_process():
        yield


def build(path, kind, changed):
    """Flags, backend, and the train data of its only rank."""
    cases = megatron_cases if kind == "megatron" else backend_cases
    args = cases.backend_args(path)
    vars(args).update(vars(flags()), use_kl_loss=False, skip_actor_forward_only=True, seed=1)
    vars(args).update(
        **changed, optimizer="sgd", sgd_momentum=0.0, lr=0.1, global_batch_size=8, num_steps_per_rollout=1
    )
    if kind == "megatron":
        backend = megatron_cases.MegatronBackend(args)
    else:
        from miles.backends.fsdp_utils.backend import FSDPBackend

        backend = FSDPBackend(args)
    backend.init()
    data = {name: column for name, column in random_train_data(3, vocab=300).items() if "log_probs" not in name}
    return args, backend, split_train_data(args, data)[0]


def count_layers(path, kind, changed):
    """How often layers ran forward in one training step, and the weights after it."""
    args, backend, part = build(path, kind, changed)
    ran = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: ran.append(1) if type(module).__name__ in {"MLP", "Qwen3MLP"} else None
    )
    RolloutTrainer(args, backend, Timers(backend.device)).train(0, lambda: part)
    handle.remove()
    return len(ran), {name: tensor.clone() for name, tensor in backend.hf_weights()}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("megatron", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ("fsdp", {"gradient_checkpointing": True}),
    ],
)
def test_recomputation_runs_layers_twice_and_changes_no_number(ranks, kind, changed):
    path = tiny_model("qwen3")
    once, weights = run_ranks(1, count_layers, path, kind, {})[0]
    twice, found = run_ranks(1, count_layers, path, kind, changed)[0]
    assert twice == 2 * once
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def metrics_of(path, changed):
    args, backend, part = build(path, "megatron", {"skip_actor_forward_only": False, **changed})
    return RolloutTrainer(args, backend, Timers(backend.device)).train(0, lambda: part)


@pytest.mark.full
def test_entropy_is_measured_before_training_on_request(ranks):
    path = tiny_model("qwen3")
    without, found = (run_ranks(1, metrics_of, path, {"use_rollout_entropy": wanted})[0] for wanted in (False, True))
    assert "rollout/entropy" not in without
    assert 0 < found["rollout/entropy"] < 10


def norms(path):
    args, backend, part = build(path, "megatron", {"log_params_norm": True})
    told = RolloutTrainer(args, backend, Timers(backend.device)).train(0, lambda: part)["train/params_norm"]
    return told, sum(tensor.double().square().sum().item() for _, tensor in backend.hf_weights()) ** 0.5


@pytest.mark.full
def test_the_norm_of_the_parameters_is_told_on_request(ranks):
    told, expected = run_ranks(1, norms, tiny_model("qwen3"))[0]
    assert told == pytest.approx(expected, rel=1e-5)
