"""Numbers that make sense, flag by flag."""

from __future__ import annotations

import math

from miles.flags.draft import Draft
from miles.flags.flag import Plain
from miles.flags.table import Table

_INF = math.inf
_AT_LEAST_1 = (
    "actor_num_nodes",
    "actor_num_gpus_per_node",
    "rollout_num_gpus",
    "rollout_num_gpus_per_engine",
    "num_gpus_per_node",
    "distributed_timeout_minutes",
    "save_interval",
    "rollout_batch_size",
    "n_samples_per_prompt",
    "global_batch_size",
    "num_steps_per_rollout",
    "over_sampling_batch_size",
    "num_epoch",
    "data_pad_size_multiplier",
    "log_probs_max_tokens_per_gpu",
    "update_weight_buffer_size",
    "rollout_max_response_len",
    "rollout_max_context_len",
    "rollout_max_prompt_len",
    "eval_interval",
    "n_samples_per_eval_prompt",
    "eval_max_response_len",
    "eval_max_prompt_len",
    "eval_max_context_len",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "max_tokens_per_gpu",
    "micro_batch_size",
    "make_vocab_size_divisible_by",
    "sglang_server_concurrency",
    "async_max_concurrent_samples",
    "update_weights_interval",
    "ref_update_interval",
    "sglang_router_request_timeout_secs",
    "log_interval",
    "tensorboard_log_interval",
    "tensorboard_queue_size",
    "debug_exit_after_rollout",
    "memory_snapshot_num_steps",
    "lr_decay_iters",
    "lr_wsd_decay_iters",
    "ddp_bucket_size",
    "ddp_num_buckets",
    "seq_length",
    "rollout_health_check_interval",
    "recovery_interval",
    "trainer_heartbeat_checker_failure_threshold",
    "rollout_health_check_timeout",
    "lora_alpha",
    "hosts_at_once",
    "nodes",
)
_AT_LEAST_0 = (
    "rollout_health_check_first_wait",
    "trainer_heartbeat_checker_first_wait",
    "profile_step_start",
    "num_rollout",
    "start_rollout_id",
    "ckpt_step",
    "ref_ckpt_step",
    "lr_warmup_iters",
    "eval_min_new_tokens",
    "rollout_temperature",
    "eval_temperature",
    "lr",
    "min_lr",
    "lr_warmup_init",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "adam_eps",
    "clip_grad",
    "kl_loss_coef",
    "eps_clip",
    "eps_clip_high",
    "decoupled_lr",
    "decoupled_min_lr",
    "prometheus_port",
    "rm_max_retries",
    "kl_coef",
    "opd_kl_coef",
    "opsm_delta",
    "value_clip",
    "num_critic_only_steps",
    "critic_lr",
    "critic_lr_warmup_iters",
    "opd_teacher_ckpt_step",
    "max_weight_staleness",
    "lora_rank",
    "tis_clip_low",
)

RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(_AT_LEAST_1, (1, _INF, "1 or more")),
    **dict.fromkeys(_AT_LEAST_0, (0, _INF, "0 or more")),
    "rollout_top_p": (math.ulp(0.0), 1, "above 0, up to 1"),
    "eval_top_p": (math.ulp(0.0), 1, "above 0, up to 1"),
    "adam_beta1": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "adam_beta2": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "attention_dropout": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "hidden_dropout": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "lora_dropout": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "async_data_buffer_capacity_factor": (math.ulp(0.0), _INF, "above 0"),
    "mfu_peak_tflops": (math.ulp(0.0), _INF, "above 0"),
    "gamma": (0, 1, "0 to 1"),
    "lambd": (0, 1, "0 to 1"),
    "trainer_heartbeat_checker_interval": (math.ulp(0.0), _INF, "above 0"),
    "trainer_heartbeat_checker_timeout": (math.ulp(0.0), _INF, "above 0"),
    "recovery_stop_timeout": (math.ulp(0.0), _INF, "above 0"),
    "start_timeout": (math.ulp(0.0), _INF, "above 0"),
    "rm_timeout": (math.ulp(0.0), _INF, "above 0"),
    "update_weight_timeout": (math.ulp(0.0), _INF, "above 0"),
    "update_weight_silence_timeout": (math.ulp(0.0), _INF, "above 0"),
    "sgd_momentum": (0, math.nextafter(1, 0), "0 or more, below 1"),
    "lr_warmup_fraction": (0, 1, "0 to 1"),
    "load_debug_rollout_data_subsample": (math.ulp(0.0), 1, "above 0, up to 1"),
    "tis_clip": (math.ulp(0.0), _INF, "above 0"),
    "eps_clip_c": (math.nextafter(1, 2), _INF, "above 1"),
    "sglang_router_port": (1, 65535, "1 to 65535"),
    "seed": (0, 2**32 - 1, "0 to 4294967295"),
    "rollout_seed": (0, 2**32 - 1, "0 to 4294967295"),
}
"""Lowest, highest and both in words, by dest."""


def check_ranges(draft: Draft, table: Table) -> None:
    """Each number by itself. One that is out of range counts as not given from here on."""
    for dest, (low, high, allowed) in RANGES.items():
        value = draft[dest]
        if dest in draft.typed and value is not None and not low <= value <= high:
            _refuse(draft, table, dest, "is out of range", allowed)
    for dest, means in (
        ("rollout_top_k", "truncation"),
        ("eval_top_k", "truncation"),
        ("log_probs_chunk_size", "chunks"),
    ):
        if dest in draft.typed and draft[dest] != -1 and draft[dest] < 1:
            _refuse(draft, table, dest, "is out of range", f"1 or more, or -1 for no {means}")
    for dest in draft.typed:
        if isinstance(draft[dest], float) and math.isinf(draft[dest]):
            _refuse(draft, table, dest, "is not finite", "a finite number")


def _refuse(draft: Draft, table: Table, dest: str, what: str, allowed: str) -> None:
    draft.problem(dest, what, allowed=allowed, advice=f"Give a value that is {allowed}.")
    default: Plain = table.by_dest[dest].default
    draft[dest] = default
    draft.typed -= {dest}
