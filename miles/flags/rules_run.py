"""Rules: which parts of a run there are, on what device, on how many of them."""

from __future__ import annotations

from miles.flags.draft import Draft
from miles.flags.row_checks import SFT_ROLLOUT
from miles.flags.rules_external import resolve_external
from miles.flags.rules_nodes import is_remote, slots_of
from miles.flags.rules_parallel import data_parallel
from miles.flags.server_groups import resolve_groups


def resolve_parts(draft: Draft) -> None:
    """Trainer, engines, or both."""
    if draft["load_debug_rollout_data"] and not draft["debug_train_only"]:
        draft["debug_train_only"] = True
    if draft["debug_rollout_only"] and draft["debug_train_only"]:
        draft.problem(
            "debug_rollout_only",
            f"there would be neither trainer nor engines with {_train_only_flag(draft)}",
            advice="Give one of the two.",
        )
        draft["debug_train_only"] = False
    if draft["loss_type"] == "sft_loss":
        _supervised(draft)
    for dest, name in (
        ("save_debug_rollout_data", "rollout_data/{rollout_id}.pt"),
        ("save_debug_train_data", "train_data/{rollout_id}_{rank}.pt"),
        ("save_debug_trajectory_data", "trajectory/{rollout_id}.jsonl"),
    ):
        if draft["dump_details"] and not draft[dest]:
            draft[dest] = f"{draft['dump_details'].rstrip('/')}/{name}"


def _train_only_flag(draft: Draft) -> str:
    return draft.flag("debug_train_only" if "debug_train_only" in draft.typed else "load_debug_rollout_data")


def _supervised(draft: Draft) -> None:
    """Supervised training: the answers are in the data, so engines are needed for evaluations only."""
    draft["compute_advantages_and_returns"] = False
    if draft["rollout_function_path"] is None and not draft["load_debug_rollout_data"]:
        draft["rollout_function_path"] = SFT_ROLLOUT
    is_ours = draft["rollout_function_path"] == SFT_ROLLOUT
    if is_ours and draft["eval_interval"] is None and not draft["debug_train_only"]:
        if draft["debug_rollout_only"]:
            draft.problem(
                "debug_rollout_only",
                "supervised training generates nothing",
                advice="Remove it, or use --loss-type policy_loss.",
            )
            return
        draft["debug_train_only"] = True
        draft.notice("supervised training without evaluation needs no engines: none are started")


def resolve_device(draft: Draft) -> None:
    """``cuda`` or ``cpu``, and what follows for numbers and kernels."""
    facts = draft.facts
    can_cuda = facts.gpus > 0 and facts.torch_has_cuda
    if draft["device"] == "auto":
        draft["device"] = "cuda" if can_cuda else "cpu"
        if facts.gpus and not facts.torch_has_cuda:
            draft.notice(f"{facts.gpus} GPUs are not used: the installed torch is a CPU build")
        elif facts.gpu_fault:
            draft.notice(f"no GPU is used: {facts.gpu_fault}")
        if is_remote(draft):
            draft.notice(f"--device is {draft['device']}, as on this machine; give it if the nodes are different")
    elif draft["device"] == "cuda" and not can_cuda and not is_remote(draft):
        why = facts.gpu_fault or ("the installed torch is a CPU build" if facts.gpus else "this machine shows no GPU")
        draft.problem("device", why, allowed="cpu or auto", advice="Use --device auto.")
    is_cpu = draft["device"] == "cpu"
    draft["bf16"] = bool(draft["bf16"]) or not is_cpu
    draft["params_dtype"] = "bfloat16" if draft["bf16"] else "float32"
    if is_cpu:
        _without_cuda(draft)
    elif draft["distributed_backend"] == "gloo":
        draft.problem(
            "distributed_backend", "models run on CUDA, whose ranks need nccl", allowed="nccl", advice="Leave it out."
        )
    if draft["true_on_policy_mode"]:
        draft["deterministic_mode"] = True
        if not is_cpu:  # there is one kernel on a CPU
            draft.values.setdefault("sglang_enable_deterministic_inference", True)


def _without_cuda(draft: Draft) -> None:
    """A default that a CPU cannot do becomes what it can; the same thing typed is refused."""
    replacements = {
        "distributed_backend": ("nccl", "gloo", draft.trains),
        "attn_implementation": ("flash_attention_2", "sdpa", draft["train_backend"] == "fsdp"),
    }
    for dest, (cannot, can, matters) in replacements.items():
        if draft[dest] != cannot:
            continue
        if dest in draft.typed:
            draft.problem(
                dest, "needs CUDA, and models run on the CPU", allowed=can, advice=f"Leave it out, or give {can}."
            )
        elif matters:
            draft.notice(f"{draft.flag(dest)} is {can}: {cannot} needs CUDA")
        draft[dest] = can
    if draft["attention_backend"] == "flash":
        draft.problem(
            "attention_backend", "needs CUDA, and models run on the CPU", allowed="auto", advice="Leave it out."
        )
    if draft.generates and draft.values.get("sglang_enable_deterministic_inference"):
        draft.problem(
            "sglang_enable_deterministic_inference",
            "SGLang has kernels for it on GPUs, and models run on the CPU",
            advice="Leave it out; --deterministic-mode makes training deterministic, and recorded rollouts "
            "(--load-debug-rollout-data) the run.",
        )
    if draft["fsdp_cpu_offload"]:
        draft.notice("--fsdp-cpu-offload: everything is on the CPU anyway")


_ONLY_MEGATRON = {
    "recompute_granularity": "use --gradient-checkpointing",
    "recompute_method": "use --gradient-checkpointing",
    "recompute_num_layers": "use --gradient-checkpointing",
    "recompute_modules": "use --gradient-checkpointing",
    "use_checkpoint_opt_param_scheduler": "the schedule is that of the flags",
    "attention_backend": "use --attn-implementation",
    "optimizer_cpu_offload": "use --fsdp-cpu-offload",
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), "models of the FSDP backend drop what config.json says"),
    **dict.fromkeys(
        (
            "distribute_saved_activations",
            "bias_swiglu_fusion",
            "disable_bf16_reduced_precision_matmul",
            "overlap_grad_reduce",
            "ddp_bucket_size",
            "ddp_num_buckets",
            "grad_reduce_in_bf16",
            "ddp_pad_buckets_for_high_nccl_busbw",
            "ddp_reduce_scatter_with_fp32_accumulation",
            "decoupled_lr",
            "decoupled_min_lr",
            "apply_wd_to_qk_layernorm",
        ),
        "FSDP2 has no such setting",
    ),
}
_ONLY_FSDP = {
    "attn_implementation": "use --attention-backend",
    "gradient_checkpointing": "use --recompute-granularity",
    "fsdp_cpu_offload": "use --train-backend fsdp",
}


def resolve_backend(draft: Draft) -> None:
    """What one of the two training backends cannot do."""
    is_fsdp = draft["train_backend"] == "fsdp"
    for dest, instead in (_ONLY_MEGATRON if is_fsdp else _ONLY_FSDP).items():
        does_nothing = dest.endswith("_dropout") and not draft[dest]
        if dest in draft.typed and not does_nothing:
            other = "Megatron" if is_fsdp else "FSDP"
            draft.problem(dest, f"only the {other} backend has it", advice=f"Leave it out: {instead}.")


def resolve_cluster(draft: Draft) -> None:
    """World size, engines, and whether this machine has room for both."""
    num_nodes = draft["num_nodes"]
    if draft.trains and num_nodes is not None and draft["actor_num_nodes"] > num_nodes:
        draft.problem(
            "actor_num_nodes",
            f"the run has {num_nodes} machines" if is_remote(draft) else "the run has this machine alone",
            allowed=f"up to {num_nodes}",
            advice="Name more machines with --hosts or --hostfile, or put all ranks into --actor-num-gpus-per-node.",
        )
    world = draft["actor_num_nodes"] * draft["actor_num_gpus_per_node"] if draft.trains else 0
    draft["world_size"] = world
    draft["dp_size"] = data_parallel(draft, world)
    slots = _slots(draft)
    if draft["debug_rollout_only"] and draft["colocate"]:
        draft["colocate"] = False
        draft.notice("--colocate has nobody to share with under --debug-rollout-only")
    resolve_external(draft)
    resolve_groups(draft)
    _resolve_offload(draft)
    engines_gpus = _engine_gpus(draft, world, slots) if draft.generates else 0
    draft["rollout_num_gpus"] = engines_gpus
    _count_engines(draft, engines_gpus)
    needed = max(world, engines_gpus) if draft["colocate"] else world + engines_gpus
    _check_room(draft, needed, slots)


def _slots(draft: Draft) -> int | None:
    """GPUs of all machines, or the CPU slots that they offer in their place. None: that is known when they join."""
    if is_remote(draft):
        found = slots_of(draft)
        return None if not found or None in found else sum(one or 0 for one in found)
    if draft["device"] == "cpu":
        return int(draft["num_gpus_per_node"] or max(8, draft.facts.cores))
    asked = draft["num_gpus_per_node"]
    if asked is not None and asked > draft.facts.gpus:
        draft.problem(
            "num_gpus_per_node",
            f"this machine shows {draft.facts.gpus} GPUs",
            allowed=f"up to {draft.facts.gpus}",
            advice="Lower it, or look at CUDA_VISIBLE_DEVICES.",
        )
    return int(min(asked or draft.facts.gpus, draft.facts.gpus))


def _resolve_offload(draft: Draft) -> None:
    for dest in ("offload_train", "offload_rollout"):
        if draft[dest] is None:
            draft[dest] = bool(draft["offload"] or draft["colocate"])
    if not (draft.trains and draft.generates):
        draft["offload_train"] = draft["offload_rollout"] = False


def _engine_gpus(draft: Draft, world: int, slots: int | None) -> int:
    per_engine: int = draft["rollout_num_gpus_per_engine"]
    given: int | None = draft["rollout_num_gpus"]
    if draft["rollout_external"]:
        return 0
    if draft["colocate"]:
        if given not in (None, world):
            draft.notice(f"--rollout-num-gpus {given} is ignored: with --colocate engines have the trainer's {world}")
        return world
    if given is not None:
        return given
    if draft["device"] == "cpu":
        draft.notice(f"--rollout-num-gpus is {per_engine}: one engine, for CPU slots are no devices to fill")
        return per_engine
    if slots is None:
        draft.problem(
            "rollout_num_gpus",
            "how many GPUs the trainer leaves is not known before the nodes join",
            advice="Give it, or say with --num-gpus-per-node or slots= in the hostfile what each node has.",
        )
        return per_engine
    left = slots - world
    if left < per_engine:
        draft.problem(
            "rollout_num_gpus",
            f"the trainer takes {world} of {slots} GPUs and leaves {max(0, left)}, an engine needs {per_engine}",
            advice="Share them with --colocate, or lower --actor-num-gpus-per-node.",
        )
        return per_engine
    return left - left % per_engine


def _count_engines(draft: Draft, gpus: int) -> None:
    per_engine = draft["rollout_num_gpus_per_engine"]
    external = draft["rollout_external_engine_addrs"] or [] if draft["rollout_external"] else []
    groups = draft["engine_groups"]
    draft["rollout_num_engines"] = len(external) or gpus // per_engine
    if groups:
        draft["rollout_num_engines"] = sum(group["num_engines"] for group in groups)
    if draft["sglang_router_port"] is not None and not draft["sglang_router_ip"]:
        port = draft["sglang_router_port"]
        draft.notice(
            f"--sglang-router-port {port} has no effect without --sglang-router-ip: a router that the run starts takes "
            "a free port, which user code finds in args.sglang_router_port"
        )
    if draft["sglang_router_ip"] and draft["sglang_router_port"] is None:
        draft.problem("sglang_router_ip", "a router that runs already has a port", advice="Give --sglang-router-port.")
    if gpus % per_engine and not groups:
        whose = "the trainer's, which engines share," if draft["colocate"] else "of the rollout"
        draft.problem(
            "rollout_num_gpus_per_engine",
            f"the {gpus} GPUs {whose} cannot be divided into engines of {per_engine}",
            allowed=f"a divisor of {gpus}",
            advice="Change it, or the number of GPUs.",
        )
    if draft.values.get("sglang_tp_size", per_engine) != per_engine:
        draft.problem(
            "sglang_tp_size",
            f"an engine has the {per_engine} GPUs of --rollout-num-gpus-per-engine",
            allowed=str(per_engine),
            advice="Leave it out, and give --rollout-num-gpus-per-engine.",
        )
    draft["sglang_tp_size"] = per_engine


def _check_room(draft: Draft, needed: int, slots: int | None) -> None:
    if is_remote(draft):
        draft["cpu_slots"] = int(draft["num_gpus_per_node"] or 0) if draft["device"] == "cpu" else 0
        if slots is None or needed <= slots or draft["device"] == "cpu":
            return
    elif draft["device"] == "cpu":
        draft["cpu_slots"] = max(slots or 0, needed)
        if needed > draft.facts.cores:
            draft.notice(f"{needed} ranks and engines share {draft.facts.cores} CPU cores")
        return
    else:
        draft["cpu_slots"] = 0
    if slots is not None and needed > slots:
        flag = "actor_num_gpus_per_node" if draft.trains else "rollout_num_gpus"
        whose = f"{draft['num_nodes']} machines offer" if is_remote(draft) else "this machine offers"
        draft.problem(
            flag,
            f"trainer and engines need {needed} GPUs, {whose} {slots}",
            allowed=f"{slots} in all",
            advice="Lower the numbers, or share GPUs with --colocate.",
        )
