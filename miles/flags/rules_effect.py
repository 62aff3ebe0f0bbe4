"""Flags that only matter under another one: typed without it, they are told to have no effect in this run.

A table: which dests, when they are read, and what is missing where they are not. A flag that is built later gets its
line here; the tests go through all lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from miles.flags.draft import Draft
from miles.flags.rules_algorithm import GROUP_RELATIVE
from miles.flags.rules_reward import asks_remote


@dataclass(frozen=True, slots=True)
class Effect:
    """These flags are read only if ``when`` holds.

    Attributes:
        dests: Their keys in the config.
        when: Whether this run reads them. The draft is resolved.
        otherwise: What is said after "has no effect".
    """

    dests: tuple[str, ...]
    when: Callable[[Draft], bool]
    otherwise: str


def _is_set(*dests: str) -> Callable[[Draft], bool]:
    """One of these flags has a value that is neither false nor None. A flag that no table has is not set."""
    return lambda draft: any(draft.values.get(dest) not in (None, False) for dest in dests)


def _is(dest: str, *values: object) -> Callable[[Draft], bool]:
    return lambda draft: bool(draft.values.get(dest) in values)


def _needs(dests: str, when: Callable[[Draft], bool], otherwise: str) -> Effect:
    return Effect(tuple(dests.split()), when, otherwise)


def _warms_up(draft: Draft) -> bool:
    return bool(draft["lr_warmup_iters"] or draft["lr_warmup_fraction"])


def _decays(draft: Draft) -> bool:
    return bool(draft["lr_decay_style"] != "constant")


POLICY = (
    "eps_clip eps_clip_high eps_clip_c entropy_coef use_kl_loss use_tis custom_pg_loss_reducer_function_path "
    "advantage_estimator kl_coef use_opsm use_opd keep_old_actor"
)
CRITIC = (
    "lambd value_clip num_critic_only_steps critic_load critic_save critic_lr critic_lr_warmup_iters critic_num_nodes "
    "critic_num_gpus_per_node"
)
WANDB = (
    "wandb_project wandb_group wandb_mode wandb_dir wandb_key wandb_host wandb_team wandb_run_id wandb_run_name "
    "wandb_random_suffix"
)

EFFECTS: tuple[Effect, ...] = (
    _needs("kl_loss_coef kl_loss_type use_unbiased_kl", _is_set("use_kl_loss"), "without --use-kl-loss"),
    _needs(
        "ref_update_interval",
        lambda draft: bool(draft["use_kl_loss"] or draft["kl_coef"]),
        "without --use-kl-loss or --kl-coef: there is no reference model",
    ),
    _needs(
        "custom_tis_function_path tis_clip tis_clip_low",
        _is_set("use_tis", "get_mismatch_metrics"),
        "without --use-tis or --get-mismatch-metrics",
    ),
    _needs(POLICY, lambda draft: draft["loss_type"] != "sft_loss", "with --loss-type sft_loss"),
    _needs(CRITIC, _is("advantage_estimator", "ppo"), "without --advantage-estimator ppo"),
    _needs(
        "gamma",
        _is("advantage_estimator", "ppo", "reinforce_plus_plus"),
        "without --advantage-estimator ppo or reinforce_plus_plus",
    ),
    _needs(
        "rewards_normalization",
        _is("advantage_estimator", *GROUP_RELATIVE),
        "with this --advantage-estimator, which takes rewards as they are",
    ),
    _needs("ssh_config sync_code remote_python hosts_at_once", _is("launcher", "ssh"), "without --hosts or --hostfile"),
    _needs("interface controller_host", lambda draft: draft["launcher"] != "local", "on one machine"),
    _needs("mtp_loss_scaling_factor", _is_set("enable_mtp_training"), "without --enable-mtp-training"),
    _needs("opsm_delta", _is_set("use_opsm"), "without --use-opsm"),
    _needs("opd_kl_coef opd_teacher_key", _is_set("use_opd"), "without --use-opd"),
    _needs("loss_mask_type", _is("loss_type", "sft_loss"), "without --loss-type sft_loss"),
    _needs(
        "grpo_std_normalization",
        lambda draft: draft["n_samples_per_prompt"] > 1,
        "with one response per prompt: it is the default there",
    ),
    _needs(
        "eval_prompt_data eval_config n_samples_per_eval_prompt eval_max_response_len eval_temperature eval_top_p "
        "eval_top_k eval_max_prompt_len eval_max_context_len eval_min_new_tokens eval_input_key eval_label_key "
        "eval_tool_key eval_reward_key eval_function_path skip_eval_before_train custom_eval_rollout_log_function_path",
        _is_set("eval_interval"),
        "without --eval-interval",
    ),
    _needs("max_tokens_per_gpu", _is_set("use_dynamic_batch_size"), "without --use-dynamic-batch-size"),
    _needs("log_probs_max_tokens_per_gpu", _is_set("use_dynamic_batch_size"), "without --use-dynamic-batch-size"),
    _needs("micro_batch_size", lambda draft: not draft["use_dynamic_batch_size"], "with --use-dynamic-batch-size"),
    _needs("adam_beta1 adam_beta2 adam_eps", _is("optimizer", "adam"), "without --optimizer adam"),
    _needs(
        "overlap_cpu_optimizer_d2h_h2d",
        _is_set("optimizer_cpu_offload"),
        "unless the optimizer is on the host (--optimizer-cpu-offload, with CUDA)",
    ),
    _needs("sgd_momentum", _is("optimizer", "sgd"), "without --optimizer sgd"),
    _needs("min_lr", _decays, "with --lr-decay-style constant"),
    _needs(
        "lr_decay_iters",
        lambda draft: _decays(draft) or draft["lr_warmup_fraction"] is not None,
        "with --lr-decay-style constant",
    ),
    _needs("lr_wsd_decay_iters lr_wsd_decay_style", _is("lr_decay_style", "WSD"), "without --lr-decay-style WSD"),
    _needs("lr_warmup_init", _warms_up, "without --lr-warmup-iters or --lr-warmup-fraction"),
    _needs("decoupled_min_lr", _is_set("decoupled_lr"), "without --decoupled-lr"),
    _needs("ddp_bucket_size ddp_num_buckets", _is_set("overlap_grad_reduce"), "without --overlap-grad-reduce"),
    _needs("grad_reduce_in_bf16", _is_set("bf16"), "without --bf16: gradients have the parameters' float32"),
    _needs(
        "ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation",
        _is("optimizer", "adam"),
        "without --optimizer adam, whose state is sharded",
    ),
    _needs("bias_swiglu_fusion disable_bf16_reduced_precision_matmul", _is("device", "cuda"), "on a CPU"),
    _needs(
        "make_vocab_size_divisible_by",
        _is("train_backend", "megatron"),
        "with --train-backend fsdp, which pads no vocabulary",
    ),
    _needs(
        "moe_grouped_gemm moe_permute_fusion",
        lambda draft: False,
        "here: experts are computed one by one, without Transformer Engine's kernels",
    ),
    _needs(
        "sequence_parallel",
        lambda draft: draft["tensor_model_parallel_size"] > 1,
        "with --tensor-model-parallel-size 1",
    ),
    _needs("seq_length", lambda draft: False, "here: sequences have the length of their samples"),
    _needs(
        "use_checkpoint_opt_param_scheduler exit_on_missing_checkpoint",
        lambda draft: "load" in draft.typed or draft["resume"] is not None,
        "without --load",
    ),
    _needs(
        "no_load_optim no_load_rng",
        lambda draft: "load" in draft.typed or draft["resume"] is not None,
        "without --load",
    ),
    _needs("no_save_rng", _is_set("save"), "without --save"),
    _needs(
        "rollout_health_check_interval rollout_health_check_timeout rollout_health_check_first_wait",
        _is_set("use_fault_tolerance"),
        "without --use-fault-tolerance",
    ),
    _needs("offload_rollout_level", _is_set("offload_rollout"), "unless engines are offloaded"),
    _needs("offload_train_target", _is_set("offload_train"), "unless the trainer is offloaded"),
    _needs(
        "offload_train_disk_dir offload_train_disk_chunk_mb",
        lambda draft: bool(draft["offload_train"]) and draft["offload_train_target"] == "disk",
        "unless the trainer is offloaded, with --offload-train-target disk",
    ),
    _needs("rm_url rm_max_retries rm_timeout", asks_remote, "without --rm-type remote_rm"),
    _needs(
        "sglang_router_policy sglang_router_request_timeout_secs",
        lambda draft: not draft["sglang_router_ip"],
        "with --sglang-router-ip, whose router runs already",
    ),
    _needs(
        "load_debug_rollout_data_subsample", _is_set("load_debug_rollout_data"), "without --load-debug-rollout-data"
    ),
    _needs(
        "apply_chat_template_kwargs chat_template_path",
        lambda draft: bool(
            draft["apply_chat_template"]
            or draft["loss_type"] == "sft_loss"
            or draft["custom_generate_function_path"]
            or draft["rollout_function_path"]
            or any(facts.has_messages for facts in draft.facts.data.values())
        ),
        "without --apply-chat-template: the prompts are text",
    ),
    _needs(WANDB, _is_set("use_wandb"), "without --use-wandb"),
    _needs(
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name mlflow_run_id",
        _is_set("use_mlflow"),
        "without --use-mlflow",
    ),
    _needs(
        "tb_project_name tb_experiment_name tensorboard_queue_size",
        _is_set("use_tensorboard"),
        "without --use-tensorboard",
    ),
    _needs(
        "tensorboard_log_interval",
        _is_set("use_tensorboard", "use_wandb", "use_mlflow", "use_prometheus"),
        "without a tracker, such as --use-tensorboard",
    ),
    _needs(
        "prometheus_port prometheus_address prometheus_run_name", _is_set("use_prometheus"), "without --use-prometheus"
    ),
    _needs("mask_offpolicy_in_partial_rollout", _is_set("partial_rollout"), "without --partial-rollout"),
    _needs(
        "profile_target profile_step_start profile_step_end profile_ranks",
        _is_set("use_pytorch_profiler", "profile"),
        "without --use-pytorch-profiler or --profile",
    ),
    _needs(
        "memory_snapshot_path memory_snapshot_dir memory_snapshot_num_steps memory_recorder",
        _is_set("record_memory_history"),
        "without --record-memory-history",
    ),
    _needs("update_weights_interval", _is_set("train_async"), "in train.py; use train_async.py"),
    _needs(
        "max_weight_staleness async_max_concurrent_samples async_data_buffer_capacity_factor "
        "async_unused_samples_handler custom_async_data_buffer_path",
        _is_set("fully_async"),
        "without --fully-async",
    ),
    _needs(
        "check_weight_update_skip_list", _is_set("check_weight_update_equal"), "without --check-weight-update-equal"
    ),
    _needs(
        "trainer_heartbeat_checker_interval trainer_heartbeat_checker_timeout trainer_heartbeat_checker_first_wait "
        "trainer_heartbeat_checker_failure_threshold recovery_interval recovery_stop_timeout",
        _is_set("use_fault_tolerance"),
        "without --use-fault-tolerance",
    ),
    _needs(
        "lora_alpha lora_dropout lora_type target_modules exclude_modules lora_adapter_path",
        _is_set("lora_rank"),
        "without --lora-rank",
    ),
    _needs("rollout_external_engine_addrs", _is_set("rollout_external"), "without --rollout-external"),
)
"""In no order: each flag stands in one line."""

ONLY_TRAINER = (
    "optimizer lr lr_decay_style lr_warmup_iters lr_warmup_fraction min_lr weight_decay adam_beta1 adam_beta2 "
    "clip_grad entropy_coef eps_clip eps_clip_high eps_clip_c use_kl_loss kl_loss_coef kl_loss_type use_tis "
    "tis_clip tis_clip_low tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel decoder_first_pipeline_num_layers "
    "decoder_last_pipeline_num_layers recompute_granularity recompute_method recompute_num_layers "
    "gradient_checkpointing save_hf ref_load qkv_format recompute_loss_function reset_optimizer_states "
    "use_pytorch_profiler profile record_memory_history custom_megatron_init_path "
    "custom_megatron_before_log_prob_hook_path custom_megatron_before_train_step_hook_path "
    "custom_megatron_post_save_hook_path trainer_heartbeat_checker_interval trainer_heartbeat_checker_timeout "
    "trainer_heartbeat_checker_first_wait trainer_heartbeat_checker_failure_threshold recovery_interval "
    "custom_model_provider_path rollout_data_postprocess_path mfu_peak_tflops "
    "log_params_norm use_opsm opsm_delta kl_coef gamma lambd value_clip num_critic_only_steps critic_load critic_save "
    "critic_lr critic_lr_warmup_iters opd_kl_coef opd_teacher_load use_routing_replay lora_rank ref_update_interval "
    "mtp_num_layers enable_mtp_training "
    "optimizer_cpu_offload overlap_cpu_optimizer_d2h_h2d "
)
ONLY_ENGINES = (
    "rollout_top_p rollout_top_k rollout_stop rollout_stop_token_ids rm_type rm_url group_rm custom_rm_path "
    "dynamic_sampling_filter_path over_sampling_batch_size partial_rollout sglang_server_concurrency "
    "sglang_router_policy rollout_num_gpus rollout_num_gpus_per_engine rollout_health_check_interval "
    "rollout_health_check_timeout rollout_health_check_first_wait keep_old_actor "
)


def tell_without_effect(draft: Draft) -> None:
    """One notice for the flags of each line of the table, and one for those of a side that this run lacks."""
    told: set[str] = set()
    if not draft.trains:
        told |= _tell(draft, ONLY_TRAINER.split(), "with --debug-rollout-only: nothing is trained")
    if not draft.generates and draft["loss_type"] != "sft_loss":
        told |= _tell(draft, ONLY_ENGINES.split(), "without engines: nothing is generated")
    for effect in EFFECTS:
        if not effect.when(draft):
            told |= _tell(draft, [dest for dest in effect.dests if dest not in told], effect.otherwise)


def _tell(draft: Draft, dests: list[str], otherwise: str) -> set[str]:
    typed = [dest for dest in dests if dest in draft.typed and dest in draft.values]
    if typed:
        flags = ", ".join(draft.flag(dest) for dest in typed)
        draft.notice(f"{flags} {'has' if len(typed) == 1 else 'have'} no effect {otherwise}")
    return set(typed)
