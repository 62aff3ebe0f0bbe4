"""Rules: what one of the two backends does with a flag, profiles of the trainer, and what saves need."""

from __future__ import annotations

from miles.flags.draft import Draft

_TARGETS = ("train_overall", "train_actor", "train_log_probs")


def resolve_trainer(draft: Draft) -> None:
    """Flags that only a trainer reads, beside those of losses and schedules."""
    if not draft.trains:
        return
    _check_batches(draft)
    _check_models(draft)
    _check_shards(draft)
    _check_saves(draft)
    _check_optimizer(draft)
    _check_offload(draft)
    _check_passes(draft)
    _check_profile(draft)
    _check_memory(draft)


def _check_batches(draft: Draft) -> None:
    if draft["device"] == "cpu" and "data_pad_size_multiplier" not in draft.typed:
        draft["data_pad_size_multiplier"] = 1  # kernels of a CPU gain nothing by it
    if draft["qkv_format"] != "bshd":
        return
    if draft["train_backend"] == "fsdp":
        draft.problem(
            "qkv_format", "the FSDP backend packs its batches", allowed="thd", advice="Leave it out, or use Megatron."
        )
    if draft["use_dynamic_batch_size"]:
        draft.problem(
            "qkv_format",
            "--use-dynamic-batch-size counts the tokens of packed batches",
            allowed="thd",
            advice="Give --micro-batch-size in its place, or leave bshd out.",
        )
    if draft["context_parallel_size"] != 1:
        draft.problem(
            "qkv_format",
            "not built yet: padded batches with context parallelism",
            allowed="thd",
            advice="Leave it out, or use --context-parallel-size 1.",
        )


def _check_models(draft: Draft) -> None:
    for dest in ("custom_model_provider_path", "spec"):
        if draft[dest] and draft["train_backend"] == "fsdp":
            draft.problem(
                dest, "models of the FSDP backend are those of transformers", advice="Leave it out, or use Megatron."
            )
    if draft["spec"] and len(draft["spec"]) != 2:
        draft.problem("spec", "it names a module and a function", advice="Give both, with a space between them.")


def _check_shards(draft: Draft) -> None:
    replicas, world = draft["dp_replicate_size"], draft["world_size"]
    if draft["train_backend"] != "fsdp":
        if replicas != 1:
            draft.problem("dp_replicate_size", "only the FSDP backend has it", allowed="1", advice="Leave it out.")
        if not draft["keep_fp32_master"]:
            draft.problem("keep_fp32_master", "the Megatron backend keeps them", advice="Leave it out.")
        return
    if replicas < 1 or world % replicas:
        draft.problem(
            "dp_replicate_size",
            f"{world} ranks cannot be divided into so many replicas",
            allowed=f"a divisor of {world}",
            advice="Change it, or the number of ranks.",
        )
    if draft["fsdp_cpu_offload"] and draft["device"] == "cuda" and draft["offload_train"]:
        _check_host_shards(draft)
    if not draft["keep_fp32_master"] and draft["params_dtype"] == "float32":
        draft.notice("--no-keep-fp32-master has no effect: parameters are in float32")


def _check_host_shards(draft: Draft) -> None:
    if draft["offload_train_target"] == "disk":
        draft.problem(
            "offload_train_target",
            "--fsdp-cpu-offload keeps shards in pinned memory of the host, which cannot shrink",
            allowed="cpu",
            advice="Give cpu, or leave --fsdp-cpu-offload out.",
        )


def _check_saves(draft: Draft) -> None:
    for dest in ("custom_megatron_post_save_hook_path", "save_trigger_sentinel"):
        if draft[dest] and not draft["save"]:
            draft.problem(dest, "there is no place for checkpoints", advice="Give --save, too.")


def _check_optimizer(draft: Draft) -> None:
    if draft["debug_disable_optimizer"]:
        draft["no_save_optim"] = draft["no_load_optim"] = True
        if draft["reset_optimizer_states"]:
            draft.problem(
                "reset_optimizer_states", "--debug-disable-optimizer leaves none", advice="Leave one of the two out."
            )
    if draft["debug_skip_weight_update"] and draft["check_weight_update_equal"]:
        draft.problem(
            "check_weight_update_equal",
            "with --debug-skip-weight-update engines do not get the trainer's weights",
            advice="Leave one of the two out.",
        )
    if draft["low_memory_resume"]:
        if draft["device"] == "cuda":
            draft.problem(
                "low_memory_resume",
                "not built yet on GPUs: the optimizer's state is loaded to where it stays",
                advice="Leave it out.",
            )
        else:
            draft.notice("--low-memory-resume has no effect: the optimizer's state is on the CPU anyway")


def _check_offload(draft: Draft) -> None:
    """``--optimizer-cpu-offload``: moments of Adam in host memory."""
    if not draft["optimizer_cpu_offload"] or draft["train_backend"] == "fsdp":
        return
    if draft["optimizer"] != "adam":
        draft.problem(
            "optimizer_cpu_offload",
            f"--optimizer {draft['optimizer']} stays where the parameters are",
            allowed="with --optimizer adam",
            advice="Leave one of the two out.",
        )
    elif draft["device"] == "cpu":
        draft.notice("--optimizer-cpu-offload has no effect: the optimizer is on the CPU anyway")
        draft["optimizer_cpu_offload"] = False


def _check_passes(draft: Draft) -> None:
    """What belongs to the pass over old log-probs, where there is none."""
    if not draft["skip_actor_forward_only"]:
        return
    for dest in ("use_rollout_entropy", "custom_megatron_before_log_prob_hook_path"):
        if draft[dest]:
            draft.problem(
                dest,
                "with --skip-actor-forward-only there is no pass that it belongs to",
                advice="Leave one of the two out.",
            )


def _check_profile(draft: Draft) -> None:
    traces, ranges = draft["use_pytorch_profiler"], draft["profile"]
    if ranges and not traces and draft["device"] == "cpu":
        draft.problem(
            "profile",
            "it marks what nsys records of a GPU, and models run on the CPU",
            advice="Give --use-pytorch-profiler.",
        )
    if not traces and not ranges:
        return
    unknown = [target for target in draft["profile_target"] if target not in _TARGETS]
    if unknown:
        draft.problem(
            "profile_target",
            f"{', '.join(unknown)} is not known",
            allowed=" ".join(_TARGETS),
            advice="Give some of the allowed ones.",
        )
    if draft["profile_step_end"] <= draft["profile_step_start"]:
        draft.problem(
            "profile_step_end",
            f"no step is from {draft['profile_step_start']} up to, but not including, {draft['profile_step_end']}",
            allowed=f"above {draft['profile_step_start']}",
            advice="Give --profile-step-end the first step that is not profiled.",
        )
    beyond = [rank for rank in draft["profile_ranks"] if not 0 <= rank < draft["world_size"]]
    if beyond:
        draft.problem(
            "profile_ranks",
            f"there is no rank {', '.join(map(str, beyond))}",
            allowed=f"0 to {draft['world_size'] - 1}",
            advice="Leave it out: then it is rank 0.",
        )


def _check_memory(draft: Draft) -> None:
    if draft["record_memory_history"] and draft["memory_recorder"] == "torch" and draft["device"] == "cpu":
        draft.problem(
            "record_memory_history",
            "torch records the memory of GPUs, and models run on the CPU",
            advice="Give --memory-recorder memray, which records that of the process.",
        )
