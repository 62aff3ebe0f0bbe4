"""A rollout of two GRPO steps on adapters gives the loss, the gradient norm and the weights of a plain implementation, in
every layout of both backends; what lies below does not change by a bit."""

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
    "one rank": ("megatron", 1, {}),
    "TP 2": ("megatron", 2, {"tensor_model_parallel_size": 2}),
    "SP 2, DP 2": ("megatron", 4, {**SP2, "dp_size": 2}),
    "PP 2, recomputed": ("megatron", 2, {"pipeline_model_parallel_size": 2, **RECOMPUTE}),
    "CP 2": ("megatron", 2, {"context_parallel_size": 2}),
    "FSDP": ("fsdp", 1, {}),
    "FSDP 2": ("fsdp", 2, {"dp_size": 2, "gradient_checkpointing": True}),
}
MORE = {
    "SP 2, PP 2": ("megatron", 4, {**SP2, "pipeline_model_parallel_size": 2}),
    "SP 2, CP 2": ("megatron", 4, {**SP2, "context_parallel_size": 2}),
    "DP 2": ("megatron", 2, {"dp_size": 2, "overlap_grad_reduce": True, "ddp_num_buckets": 3}),
    "SP 2, recomputed": ("megatron", 2, {**SP2, **RECOMPUTE}),
    "FSDP 3": ("fsdp", 3, {"dp_size": 3}),
}
EXPERTS = {
    "one rank": ("megatron", 1, {}),
    "SP 2": ("megatron", 2, SP2),
    "EP 2, SP 2": ("megatron", 2, {**SP2, "expert_model_parallel_size": 2}),
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
    sets = [{part for word in (text or "").split(",") for part in joined.get(word, (word,))} for text in (words, excluded)]
    return tuple(name for name in ATTENTION + DENSE if name in sets[0] - sets[1])


def compare(tmp_path, model, layout, which):
    backend, world, changed = layout
    words, excluded, kind = KINDS[which]
    targets = targets_of(words, excluded)
    adapter = write_adapter(tmp_path / "given", model, targets=targets, kind=kind)
    means, weights, pairs = run_ranks(1, plain_lora, model, adapter, {}, 7, targets, kind, distributed=False)[0]
    given = lora_flags(target_modules=words, exclude_modules=excluded, lora_type=kind, lora_adapter_path=str(adapter))
    out = tmp_path / "out"
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
def test_a_rollout_gives_the_numbers_of_the_formula(name, tmp_path):
    compare(tmp_path, tiny_model("qwen3"), (LAYOUTS | MORE)[name], "all linear")


@pytest.mark.parametrize("which", [kind for kind in KINDS if kind != "all linear"])
@pytest.mark.parametrize(
    "name",
    ["SP 2, DP 2", "FSDP 2", *(pytest.param(name, marks=pytest.mark.long) for name in ("one rank", "TP 2", "FSDP"))],
)
def test_each_choice_of_layers(name, which, tmp_path):
    compare(tmp_path, tiny_model("qwen2"), LAYOUTS[name], which)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("which", ["all linear", pytest.param("each its own A", marks=pytest.mark.long)])
def test_experts_have_adapters_too(name, which, tmp_path):
    compare(tmp_path, tiny_model("qwen3_moe", mlp_only_layers=(1,)), EXPERTS[name], which)
