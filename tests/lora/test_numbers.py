"""A rollout of two GRPO steps on adapters gives the loss, the gradient norm and the weights of a plain implementation,
in every layout of both backends; what lies below does not change by a bit."""

import functools

import pytest
import torch
from support.lora_cases import ATTENTION, DENSE, frozen_of, lora_flags, plain_lora, read_adapter, write_adapter
from support.plain_losses import assert_close
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.trained_rollouts import args_of, backend_of, data_of

from miles.backends.training_utils.rollout_trainer import RolloutTrainer
from miles.backends.training_utils.timers import Timers
from miles.utils.train_data import split_train_data

pytestmark = pytest.mark.full
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "TP 2": ("megatron", 2, {"tensor_model_parallel_size": 2}),
    "SP 2": ("megatron", 2, SP2),
    "PP 2, recomputed": ("megatron", 2, {"pipeline_model_parallel_size": 2, **RECOMPUTE}),
    "FSDP 2": ("fsdp", 2, {"dp_size": 2, "gradient_checkpointing": True}),
}
MORE = {
    "one rank": ("megatron", 1, {}),
    "FSDP": ("fsdp", 1, {}),
    "CP 2": ("megatron", 2, {"context_parallel_size": 2}),
    "SP 2, DP 2": ("megatron", 4, {**SP2, "dp_size": 2}),
    "SP 2, PP 2": ("megatron", 4, {**SP2, "pipeline_model_parallel_size": 2}),
    "SP 2, CP 2": ("megatron", 4, {**SP2, "context_parallel_size": 2}),
    "DP 2": ("megatron", 2, {"dp_size": 2, "overlap_grad_reduce": True, "ddp_num_buckets": 3}),
    "SP 2, recomputed": ("megatron", 2, {**SP2, **RECOMPUTE}),
    "FSDP 3": ("fsdp", 3, {"dp_size": 3}),
}
EXPERTS = {
    "SP 2": ("megatron", 2, SP2),
    "EP 2, SP 2": ("megatron", 2, {**SP2, "expert_model_parallel_size": 2}),
    "EP 2": ("megatron", 2, {"dp_size": 2, "expert_model_parallel_size": 2}),
    "one rank": ("megatron", 1, {}),
    "EP 2, PP 2": ("megatron", 4, {"dp_size": 2, "expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
KINDS = {
    "all linear": ("all-linear", None, "lora"),
    "each its own A": ("all-linear", None, "canonical_lora"),
    "some of those that are joined": ("q_proj,v_proj,o_proj,up_proj", None, "lora"),
    "some, each its own A": ("all-linear", "linear_fc2,q_proj,gate_proj", "canonical_lora"),
}


def trained(path, kind, changed, seed, out):
    args = args_of(path, kind, **changed)
    backend = backend_of(kind, args)
    assert backend.init() == 0
    before = frozen_of(kind, backend)
    parts = split_train_data(args, data_of(seed))
    trainer = RolloutTrainer(args, backend, Timers(backend.device))
    metrics = trainer.train(0, lambda: parts[backend.parallel.dp_rank])
    assert not (backend.frozen if kind == "megatron" else backend._frozen), "the reference needs no second model"
    after = frozen_of(kind, backend)
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapters = backend.adapters if kind == "megatron" else backend._adapters
    adapters.write(out)
    return metrics, {name: tensor.clone() for name, tensor in backend.hf_weights()}


def targets_of(words, excluded):
    joined = {"all-linear": ATTENTION + DENSE, "linear_fc2": ("down_proj",)}
    sets = [
        {part for word in (text or "").split(",") for part in joined.get(word, (word,))} for text in (words, excluded)
    ]
    return tuple(name for name in ATTENTION + DENSE if name in sets[0] - sets[1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Flags of a random adapter, and what the formula makes of it, by model and choice of layers."""

    @functools.cache
    def get(model, which):
        words, excluded, kind = KINDS[which]
        targets = targets_of(words, excluded)
        path = write_adapter(tmp_path_factory.mktemp("given") / "adapter", model, targets=targets, kind=kind)
        given = lora_flags(target_modules=words, exclude_modules=excluded, lora_type=kind, lora_adapter_path=str(path))
        return given, run_ranks(1, plain_lora, model, path, {}, 7, targets, kind, distributed=False)[0]

    return get


def compare(plain, out, model, layout, which):
    backend, world, changed = layout
    given, (means, weights, pairs) = plain(model, which)
    for metrics, found in run_ranks(world, trained, model, backend, {"dp_size": 1, **given, **changed}, 7, out):
        assert_close(metrics, means, (layout, which))
        assert set(found) == set(weights)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=name)
    written = read_adapter(out)
    assert set(written) == set(pairs)
    for name, pair in pairs.items():
        for ours, plain in zip(written[name], pair, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_a_rollout_gives_the_numbers_of_the_formula(name, plain, tmp_path):
    compare(plain, tmp_path / "out", tiny_model("qwen3"), (LAYOUTS | MORE)[name], "all linear")


CHOICES = [(name, which) for which in KINDS if which != "all linear" for name in ("SP 2", "FSDP 2", "one rank", "TP 2")]
FIRST = {("SP 2", "some, each its own A"), ("FSDP 2", "some of those that are joined")}
FIRST_EXPERTS = {("EP 2, SP 2", "all linear"), ("SP 2", "each its own A")}


def marked(choices, first):
    return [pytest.param(*choice, marks=[pytest.mark.long] * (choice not in first)) for choice in choices]


@pytest.mark.parametrize(("name", "which"), marked(CHOICES, FIRST))
def test_each_choice_of_layers(name, which, plain, tmp_path):
    compare(plain, tmp_path / "out", tiny_model("qwen2"), (LAYOUTS | MORE)[name], which)


@pytest.mark.parametrize(
    ("name", "which"),
    marked([(name, which) for which in ("all linear", "each its own A") for name in EXPERTS], FIRST_EXPERTS),
)
def test_experts_have_adapters_too(name, which, plain, tmp_path):
    compare(plain, tmp_path / "out", tiny_model("qwen3_moe", mlp_only_layers=(1,)), EXPERTS[name], which)
