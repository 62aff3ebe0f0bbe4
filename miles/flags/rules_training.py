"""Rules: flags of the loss, of recomputation and of the schedule that belong together."""

from __future__ import annotations

from miles.flags.draft import Draft


def resolve_training(draft: Draft) -> None:
    """Everything that only a trainer reads."""
    if not draft.trains:
        return
    _check_loss(draft)
    _check_correction(draft)
    _check_old_actor(draft)
    _check_steps(draft)
    _check_recompute(draft)
    _check_schedule(draft)


def _check_loss(draft: Draft) -> None:
    if draft["loss_type"] == "custom_loss" and not draft["custom_loss_function_path"]:
        draft.problem("loss_type", "it has no function", advice="Give --custom-loss-function-path.")
    if draft["custom_loss_function_path"] and draft["loss_type"] != "custom_loss":
        draft.problem(
            "custom_loss_function_path",
            f"--loss-type {draft['loss_type']} does not call it",
            advice="Give --loss-type custom_loss, or leave it out.",
        )


def _check_correction(draft: Draft) -> None:
    if draft["use_tis"] and draft["use_rollout_logprobs"]:
        draft.problem(
            "use_tis",
            "with --use-rollout-logprobs there is nothing to correct",
            advice="Leave one of the two out.",
        )
    if draft["use_tis"] and draft["tis_clip_low"] > draft["tis_clip"]:
        draft.problem(
            "tis_clip_low",
            f"the lower bound is above the upper one, --tis-clip {draft['tis_clip']}",
            allowed=f"up to {draft['tis_clip']}",
            advice="Lower it, or raise --tis-clip.",
        )


def _check_old_actor(draft: Draft) -> None:
    """``--keep-old-actor``: the pass over old log-probs is made with the weights that generated."""
    if not draft["keep_old_actor"]:
        return
    if not draft.generates or draft["loss_type"] == "sft_loss":
        draft["keep_old_actor"] = False
        return
    for dest in ("use_rollout_logprobs", "skip_actor_forward_only"):
        if draft[dest]:
            draft.problem(
                "keep_old_actor",
                f"with {draft.flag(dest)} there is no pass over old log-probs",
                advice="Leave one of the two out.",
            )
    if draft["partial_rollout"] and not draft["mask_offpolicy_in_partial_rollout"]:
        draft.problem(
            "keep_old_actor",
            "with --partial-rollout an answer that goes on has tokens of several weight versions",
            allowed="with --mask-offpolicy-in-partial-rollout, which leaves those of earlier ones out",
            advice="Give that, too, or use --use-rollout-logprobs in place of --keep-old-actor.",
        )
    if draft["use_fault_tolerance"]:
        draft.problem(
            "keep_old_actor",
            "ranks that die take the weights that they keep with them, and --use-fault-tolerance could not train again "
            "on what those made",
            advice="Leave one of the two out, or use --use-rollout-logprobs in place of --keep-old-actor.",
        )
    if draft["use_routing_replay"] and not draft["use_rollout_routing_replay"]:
        draft.problem(
            "keep_old_actor",
            "the pass over old log-probs, whose routing --use-routing-replay records, is made for each weight version",
            allowed="with --use-rollout-routing-replay, which takes the engines' routing",
            advice="Give that, too, or leave one of the two out.",
        )
    if draft["debug_skip_weight_update"]:
        draft.problem(
            "keep_old_actor",
            "with --debug-skip-weight-update engines generate with none of the trainer's weights",
            advice="Leave one of the two out.",
        )


def _check_steps(draft: Draft) -> None:
    for dest in ("allow_partial_train_step", "balance_by_flops", "use_dynamic_global_batch_size"):
        if draft[dest] and not draft["use_dynamic_batch_size"]:
            draft.problem(
                dest,
                "micro-batches have a fixed number of samples",
                advice="Give --use-dynamic-batch-size and --max-tokens-per-gpu, or leave it out.",
            )
    if draft["skip_actor_forward_only"]:
        if draft["loss_type"] != "policy_loss":
            draft.problem(
                "skip_actor_forward_only", f"--loss-type {draft['loss_type']} has no such pass", advice="Leave it out."
            )
        elif draft["num_steps_per_rollout"] != 1:
            draft.problem(
                "skip_actor_forward_only",
                f"a rollout has {draft['num_steps_per_rollout']} optimizer steps, and the ratio of later ones is not 1",
                advice="Leave it out, or train with one step per rollout.",
            )
        for dest in ("attention_dropout", "hidden_dropout"):
            if draft[dest]:
                draft.problem(
                    dest,
                    "with --skip-actor-forward-only the old log-probs would be those of the same dropout",
                    allowed="0",
                    advice="Leave one of the two out.",
                )


def _check_recompute(draft: Draft) -> None:
    granularity = draft["recompute_granularity"]
    for dest in ("recompute_method", "recompute_num_layers"):
        if granularity == "full" and draft[dest] is None:
            draft.problem(
                "recompute_granularity",
                "full needs a method and a number of layers",
                advice="Give --recompute-method uniform --recompute-num-layers 1.",
            )
        elif granularity != "full" and draft[dest] is not None:
            draft.problem(
                dest, "it belongs to full recomputation", advice="Give --recompute-granularity full, or leave it out."
            )
    if draft["recompute_modules"] and granularity != "selective":
        draft.problem(
            "recompute_modules",
            "it belongs to selective recomputation",
            advice="Give --recompute-granularity selective, or leave it out.",
        )
    if draft["distribute_saved_activations"] and (granularity != "full" or draft["tensor_model_parallel_size"] == 1):
        draft.problem(
            "distribute_saved_activations",
            "it shares what full recomputation keeps among tensor-parallel ranks",
            advice="Give --recompute-granularity full and --tensor-model-parallel-size above 1, or leave it out.",
        )
    if draft["ddp_num_buckets"] and draft["ddp_bucket_size"]:
        draft.problem("ddp_num_buckets", "--ddp-bucket-size is given, too", advice="Leave one of the two out.")
    layers, all_layers = draft["recompute_num_layers"], draft["num_layers"]
    if layers and all_layers and layers > all_layers:
        draft.problem(
            "recompute_num_layers",
            f"the model has {all_layers} layers",
            allowed=f"up to {all_layers}",
            advice="Lower it.",
        )


def _check_schedule(draft: Draft) -> None:
    for dest in ("min_lr", "lr_warmup_init"):
        if draft[dest] > draft["lr"]:
            draft.problem(
                dest,
                f"it is above --lr {draft['lr']}",
                allowed=f"up to {draft['lr']}",
                advice="Lower it, or raise --lr.",
            )
    if draft["lr_warmup_fraction"] is not None and draft["lr_warmup_iters"]:
        draft.problem("lr_warmup_fraction", "--lr-warmup-iters is given, too", advice="Leave one of the two out.")
    if draft["lr_decay_style"] == "WSD" and draft["lr_wsd_decay_iters"] is None:
        draft.problem("lr_decay_style", "WSD needs the steps of its annealing", advice="Give --lr-wsd-decay-iters.")
    start = draft["weight_decay"] if draft["start_weight_decay"] is None else draft["start_weight_decay"]
    end = draft["weight_decay"] if draft["end_weight_decay"] is None else draft["end_weight_decay"]
    if start > end or (start != end and draft["weight_decay_incr_style"] == "constant"):
        which = "end_weight_decay" if "end_weight_decay" in draft.typed else "start_weight_decay"
        draft.problem(
            which,
            f"weight decay cannot go from {start} to {end}",
            advice="Let it grow, with --weight-decay-incr-style linear or cosine.",
        )
    _check_warmup(draft)


def _check_warmup(draft: Draft) -> None:
    """Warm-up is part of the steps in which the rate decays."""
    decay = draft["lr_decay_iters"] or (draft["num_rollout"] or 0) * (draft["num_steps_per_rollout"] or 1)
    warmup = draft["lr_warmup_iters"]
    if draft["lr_decay_style"] != "constant" and decay and warmup >= decay:
        draft.problem(
            "lr_warmup_iters",
            f"the rate has decayed after {decay} steps",
            allowed=f"below {decay}",
            advice="Lower it, or raise --lr-decay-iters.",
        )
