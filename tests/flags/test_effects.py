"""A typed flag that this run does not read is reported, by a table with one case per line of it."""

from dataclasses import replace

import pytest
from support.flag_cases import FACTS, GPUS, config, outcome

from miles.flags.flag import TAKES_NO_VALUE
from miles.flags.rules_effect import EFFECTS, ONLY_ENGINES, ONLY_TRAINER
from miles.flags.table import table

RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    "--rm-type math --actor-num-gpus-per-node 2 --rollout-num-gpus 1"
)
READ = {
    "kl_loss_coef": "--use-kl-loss",
    "ref_update_interval": "--use-kl-loss",
    "custom_tis_function_path": "--get-mismatch-metrics",
    "eps_clip": "",
    "lambd": "--advantage-estimator ppo",
    "gamma": "--advantage-estimator reinforce_plus_plus --normalize-advantages",
    "rewards_normalization": "--advantage-estimator gspo",
    "opsm_delta": "--use-opsm",
    "mtp_loss_scaling_factor": "--enable-mtp-training",
    "opd_kl_coef": "--use-opd --opd-type sglang --rm-url http://h",
    "grpo_std_normalization": "",
    "eval_prompt_data": "--eval-interval 2 --eval-prompt-data name D",
    "max_tokens_per_gpu": "--use-dynamic-batch-size",
    "log_probs_max_tokens_per_gpu": "--use-dynamic-batch-size --max-tokens-per-gpu 9",
    "micro_batch_size": "",
    "adam_beta1": "",
    "sgd_momentum": "--optimizer sgd",
    "overlap_cpu_optimizer_d2h_h2d": "--optimizer-cpu-offload --device cuda",
    "min_lr": "--lr-decay-style linear",
    "lr_decay_iters": "--lr-warmup-fraction 0.1",
    "lr_wsd_decay_iters": "--lr-decay-style WSD --lr-wsd-decay-iters 1",
    "lr_warmup_init": "--lr-warmup-iters 1",
    "decoupled_min_lr": "--decoupled-lr 1",
    "ddp_bucket_size": "--overlap-grad-reduce",
    "grad_reduce_in_bf16": "--bf16",
    "ddp_pad_buckets_for_high_nccl_busbw": "",
    "make_vocab_size_divisible_by": "",
    "use_checkpoint_opt_param_scheduler": "--load M",
    "no_load_optim": "--load M",
    "no_save_rng": "--save S",
    "offload_rollout_level": "--offload-rollout",
    "rollout_health_check_interval": "--use-fault-tolerance",
    "trainer_heartbeat_checker_interval": "--use-fault-tolerance",
    "offload_train_target": "--offload-train",
    "offload_train_disk_dir": "--offload-train --offload-train-target disk",
    "rm_url": "--rm-type remote_rm --rm-url http://h",
    "sglang_router_policy": "",
    "load_debug_rollout_data_subsample": "--load-debug-rollout-data F",
    "apply_chat_template_kwargs": "--apply-chat-template",
    "mask_offpolicy_in_partial_rollout": "--partial-rollout",
    "update_weights_interval": "--train-async",
    "max_weight_staleness": "--train-async --fully-async",
    "wandb_project": "--use-wandb",
    "mlflow_tracking_uri": "--use-mlflow",
    "tb_project_name": "--use-tensorboard",
    "tensorboard_log_interval": "--use-tensorboard",
    "prometheus_port": "--use-prometheus",
    "profile_target": "--use-pytorch-profiler",
    "memory_snapshot_path": "--record-memory-history --memory-recorder memray",
    "rollout_external_engine_addrs": "--rollout-external",
    "check_weight_update_skip_list": "--check-weight-update-equal",
    "loss_mask_type": "--loss-type sft_loss",
    "sequence_parallel": "--tensor-model-parallel-size 2",
    "bias_swiglu_fusion": "--device cuda",
    "lora_alpha": "--lora-rank 2 --target-modules q_proj",
    "ssh_config": "--hosts a",
    "interface": "--hosts a",
}
"""By the first flag of a line: with this, it is read."""
NEVER = {"seq_length", "moe_grouped_gemm"}
UNREAD = {
    "eps_clip": "--loss-type sft_loss",
    "rewards_normalization": "--advantage-estimator ppo",
    "grpo_std_normalization": "--n-samples-per-prompt 1",
    "micro_batch_size": "--use-dynamic-batch-size --max-tokens-per-gpu 9",
    "adam_beta1": "--optimizer sgd",
    "ddp_pad_buckets_for_high_nccl_busbw": "--optimizer sgd",
    "make_vocab_size_divisible_by": "--train-backend fsdp",
    "offload_train_disk_dir": "--offload-train",
    "rm_url": "--rm-type math",
    "sglang_router_policy": "--sglang-router-ip h --sglang-router-port 1",
}
"""By the first flag of a line: with this (or nothing), it is not."""


def honoured(effect):
    flags = table().by_dest
    return [dest for dest in effect.dests if dest in flags and flags[dest].only is None]


LINES = [effect for effect in EFFECTS if honoured(effect)]


def words_of(dest):
    flag = table().by_dest[dest]
    if flag.kind in TAKES_NO_VALUE:
        return [flag.name]
    value = {"int": "1", "float": "0.5", "json": "{}", "path": "S"}.get(flag.kind, "name")
    value = "1.5" if dest == "eps_clip_c" else value
    value = next((str(choice) for choice in flag.choices if choice != flag.default), value)
    return [flag.name, value, *(["D"] if dest == "eval_prompt_data" else [])]


def notices(words, facts=FACTS):
    return [notice for notice in outcome(words, recipe=RECIPE, facts=facts).notices if " no effect " in notice]


@pytest.mark.parametrize("effect", LINES, ids=lambda effect: effect.dests[0])
def test_each_flag_is_told_where_nothing_reads_it(effect):
    dests = honoured(effect)
    words = UNREAD.get(effect.dests[0], "").split() + [word for dest in dests for word in words_of(dest)]
    found = [notice for notice in notices(words) if notice.endswith(effect.otherwise)]
    assert len(found) == 1
    assert {word.strip(",") for word in found[0].split() if word.startswith("--")} >= {
        table().by_dest[dest].name for dest in dests
    }


@pytest.mark.parametrize("effect", [line for line in LINES if line.dests[0] not in NEVER], ids=lambda e: e.dests[0])
def test_and_is_not_where_it_is_read(effect):
    dest = honoured(effect)[0]
    facts = GPUS if "cuda" in READ[effect.dests[0]] else FACTS
    words = [*words_of(dest), *READ[effect.dests[0]].split()]
    assert not [notice for notice in notices(words, facts) if notice.endswith(effect.otherwise)]


def test_the_table_names_each_flag_once_and_no_flag_that_is_none():
    dests = [dest for effect in EFFECTS for dest in effect.dests]
    assert len(dests) == len(set(dests))
    assert [
        dest for dest in (*dests, *ONLY_TRAINER.split(), *ONLY_ENGINES.split()) if dest not in table().by_dest
    ] == []


def test_flags_of_a_side_that_the_run_lacks_are_told_in_one_line():
    assert notices("--debug-rollout-only --lr 1e-5 --eps-clip 0.1 --optimizer adam") == [
        "--optimizer, --lr, --eps-clip have no effect with --debug-rollout-only: nothing is trained"
    ]
    found = notices("--debug-train-only --rollout-top-p 0.5 --rollout-temperature 0.5")
    assert [notice.partition(" have")[0] for notice in found] == ["--rollout-top-p, --rm-type, --rollout-num-gpus"]


def test_a_recipe_whose_flags_all_matter_has_no_such_notice():
    assert notices("--use-kl-loss --kl-loss-coef 0.1 --lr 1e-5 --load M --save S --save-interval 2") == []
    assert config("", facts=replace(FACTS, cores=8))["use_kl_loss"] is False


def test_messages_are_templated_without_the_flag_too():
    typed = f"{RECIPE} --chat-template-path T"
    facts = replace(FACTS, data={"D": replace(FACTS.data["D"], has_messages=True)})
    told = "--chat-template-path has no effect without --apply-chat-template: the prompts are text"
    assert told in outcome(typed).notices
    assert told not in outcome(typed, facts=facts).notices
