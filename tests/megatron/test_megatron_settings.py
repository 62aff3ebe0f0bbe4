"""Megatron flags reach megatron-core's configurations, and those that change the work do not change the numbers."""

import pytest
import torch
from support.megatron_cases import (
    SumOfSquares,
    TokenLogProbs,
    make_backend,
    micro_batches,
    own_part,
    sequences,
    weights_of,
)
from support.ranks import run_ranks
from support.tiny_models import tiny_model

CONFIGS = {
    "model": [
        ({"attention_dropout": 0.25, "hidden_dropout": 0.125}, {"attention_dropout": 0.25, "hidden_dropout": 0.125}),
        ({}, {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_activation_fusion": False}),
        ({"bias_swiglu_fusion": False}, {"bias_activation_fusion": False}),
        ({"disable_bf16_reduced_precision_matmul": True}, {"disable_bf16_reduced_precision_matmul": True}),
        ({"deterministic_mode": True}, {"deterministic_mode": True}),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        ),
    ],
    "ddp": [
        ({}, {"overlap_grad_reduce": False, "grad_reduce_in_fp32": False, "use_distributed_optimizer": True}),
        ({"optimizer": "sgd"}, {"use_distributed_optimizer": False}),
        ({"params_dtype": "bfloat16"}, {"grad_reduce_in_fp32": True}),
        ({"params_dtype": "bfloat16", "grad_reduce_in_bf16": True}, {"grad_reduce_in_fp32": False}),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 5000}, {"overlap_grad_reduce": True, "bucket_size": 5000}),
        ({"ddp_pad_buckets_for_high_nccl_busbw": True}, {"pad_buckets_for_high_nccl_busbw": True}),
        ({"ddp_reduce_scatter_with_fp32_accumulation": True}, {"reduce_scatter_with_fp32_accumulation": True}),
    ],
    "optimizer": [
        ({"lr": 0.5, "min_lr": 0.25, "clip_grad": 0.125}, {"lr": 0.5, "min_lr": 0.25, "clip_grad": 0.125}),
        ({"weight_decay": 0.5, "optimizer": "sgd", "sgd_momentum": 0.5}, {"weight_decay": 0.5, "sgd_momentum": 0.5}),
        (
            {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_eps": 1e-3},
            {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_eps": 1e-3, "optimizer": "adam"},
        ),
        ({"decoupled_lr": 0.5, "decoupled_min_lr": 0.25}, {"decoupled_lr": 0.5, "decoupled_min_lr": 0.25}),
        ({"apply_wd_to_qk_layernorm": True}, {"apply_wd_to_qk_layernorm": True}),
    ],
}


def read_configs(path, cases):
    """Fields of the configurations that backends with these flags were built with."""
    found = []
    for which, changed, fields in cases:
        ours = make_backend(path, **changed)
        configs = {"model": ours.model.config, "ddp": ours.model.ddp_config}
        config = configs[which] if which in configs else ours.optimizer.chained_optimizers[0].config
        found.append({name: getattr(config, name) for name in fields})
        ours.close()
    return found


def test_flags_reach_the_fields_that_they_name():
    cases = [(which, changed, wanted) for which, rows in CONFIGS.items() for changed, wanted in rows]
    found = run_ranks(1, read_configs, tiny_model("qwen3"), cases)[0]
    assert found == [wanted for _, _, wanted in cases]


def read_buckets(path):
    ours = make_backend(path, overlap_grad_reduce=True, ddp_num_buckets=4)
    return [len(ours.model.buffers), sum(len(buffer.buckets) for buffer in ours.model.buffers)]


def test_the_number_of_buckets_is_what_was_asked_for():
    buffers, buckets = run_ranks(1, read_buckets, tiny_model("qwen3"))[0]
    assert buffers == 1
    assert 3 <= buckets <= 5


def read_groups(path):
    ours = make_backend(path, decoupled_lr=0.5, apply_wd_to_qk_layernorm=True)
    names = {id(parameter): name for name, parameter in ours.model.module.named_parameters()}
    part = ours.optimizer.chained_optimizers[0]
    found = {}
    for buffer in part.gbuf_ranges:
        for dtypes in buffer.values():
            for bucket in dtypes:
                for parameter in bucket["param_map"]:
                    group = part.optimizer.param_groups[part.model_param_group_index_map[parameter][0]]
                    found[names[id(parameter)]] = (group["max_lr"], group["wd_mult"])
    return found


def test_embeddings_have_a_rate_of_their_own_and_qk_norms_decay():
    found = run_ranks(1, read_groups, tiny_model("qwen3"))[0]
    assert found["embedding.word_embeddings.weight"][0] == 0.5
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] == (1e-3, 1.0)
    assert found["decoder.layers.0.self_attention.q_layernorm.weight"][1] == 1.0
    assert found["decoder.layers.0.input_layernorm.weight"][1] == 0.0


def train(path, changed, steps=3):
    """The second rank has no sample in the second step."""
    ours = make_backend(path, **changed)
    loss = SumOfSquares(ours.parallel)
    for step in range(steps):
        samples = own_part(ours, sequences(seed=step))
        if step == 1 and ours.parallel.dp_rank == 1:
            samples = []
        ours.train_step(micro_batches(samples, 2), loss)
    return weights_of(ours)


@pytest.mark.parametrize(
    "changed",
    [
        {"overlap_grad_reduce": True, "ddp_bucket_size": 2000},
        {"overlap_grad_reduce": True, "optimizer": "sgd", "sgd_momentum": 0.0},
        {"ddp_pad_buckets_for_high_nccl_busbw": True},
        {"ddp_reduce_scatter_with_fp32_accumulation": True},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "distribute_saved_activations": True,
            "tensor_model_parallel_size": 2,
        },
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_changes_only_the_work_changes_no_number(changed):
    path = tiny_model("qwen3")
    plain = {key: changed[key] for key in ("optimizer", "sgd_momentum", "tensor_model_parallel_size") if key in changed}
    expected = run_ranks(2, train, path, plain)
    for after, before in zip(run_ranks(2, train, path, changed), expected, strict=True):
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_and_not_in_the_passes_over_log_probs():
    path = tiny_model("qwen3")
    (plain, plain_loss), (dropped, dropped_loss) = (
        run_ranks(1, pass_and_step, path, {"hidden_dropout": share, "attention_dropout": share})[0]
        for share in (0.0, 0.5)
    )
    assert torch.equal(plain, dropped)
    assert plain_loss != pytest.approx(dropped_loss, rel=1e-3)


def pass_and_step(path, changed):
    ours = make_backend(path, **changed)
    rows = ours.forward_only(micro_batches(sequences(seed=5), 2), TokenLogProbs(ours.parallel))
    outcome = ours.train_step(micro_batches(sequences(seed=5), 2), SumOfSquares(ours.parallel))
    return torch.cat([part for row in rows for part in row]), outcome.metrics["loss"].item()
