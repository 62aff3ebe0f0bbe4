"""Rules: what an advantage estimator needs, PPO's critic, and the teacher of on-policy distillation."""

from __future__ import annotations

from miles.flags.draft import Draft
from miles.flags.rules_model import choose_checkpoint
from miles.utils.teachers import read_teachers

GROUP_RELATIVE = ("grpo", "gspo", "reinforce_plus_plus_baseline")
"""Estimators whose rewards are relative to the other responses of the prompt."""
REINFORCE = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
DISTILLATION = "on_policy_distillation"
TEACHER_REWARD = "miles.rollout.on_policy_distillation.reward_func"


def resolve_algorithm(draft: Draft) -> None:
    """Before rewards and models are looked at: distillation may need no other reward, a KL divergence a reference."""
    if draft["loss_type"] == "sft_loss":
        return
    if draft["advantage_estimator"] == DISTILLATION:
        draft["use_opd"] = True
    _check_distillation(draft)
    if not draft.trains:
        return
    _check_estimator(draft)
    _check_shaping(draft)
    if draft["advantage_estimator"] == "ppo":
        _check_critic(draft)


def _check_estimator(draft: Draft) -> None:
    estimator = draft["advantage_estimator"]
    if estimator in REINFORCE and not draft["normalize_advantages"]:
        draft.problem(
            "advantage_estimator",
            "its advantages are normalised over the whole batch",
            allowed="with --normalize-advantages",
            advice="Give --normalize-advantages, or another estimator.",
        )
    if estimator in GROUP_RELATIVE and draft["n_samples_per_prompt"] == 1 and draft["rewards_normalization"]:
        draft.notice(
            f"--advantage-estimator {estimator} compares the responses of a prompt, and with --n-samples-per-prompt 1 "
            "there is one: every advantage is 0"
        )


def _check_shaping(draft: Draft) -> None:
    """``--kl-coef``: the KL divergence from the reference model in rewards."""
    if not draft["kl_coef"]:
        return
    estimator = draft["advantage_estimator"]
    if draft["use_kl_loss"] and draft["kl_loss_coef"]:
        draft.problem(
            "kl_coef",
            "with --kl-loss-coef the divergence would be in rewards and in the loss",
            advice="Leave one of the two out.",
        )
    if estimator == "ppo":
        draft.problem("kl_coef", "PPO's rewards have none", allowed="0", advice="Use --use-kl-loss --kl-loss-coef.")
    elif estimator not in REINFORCE:
        draft.notice(f"--kl-coef has no effect with --advantage-estimator {estimator}: rewards have no KL divergence")
        draft["kl_coef"] = 0.0
    elif draft["skip_actor_forward_only"] and not draft["use_rollout_logprobs"]:
        _needs_old(draft, "kl_coef")
    if draft["kl_coef"] and not draft["ref_load"] and draft["hf_checkpoint"]:
        draft["ref_load"] = draft["hf_checkpoint"]
        draft.notice("the reference model is --hf-checkpoint: --ref-load is not given")


def _needs_old(draft: Draft, dest: str) -> None:
    draft.problem(
        "skip_actor_forward_only",
        f"{draft.flag(dest)} needs the log-probs of that pass",
        advice=f"Leave it out, or leave {draft.flag(dest)} out, or give --use-rollout-logprobs.",
    )


def _check_critic(draft: Draft) -> None:
    """The critic lives in the actor's ranks."""
    if draft["train_backend"] != "megatron":
        draft.problem(
            "advantage_estimator",
            f"it needs a critic, which --train-backend {draft['train_backend']} has none of",
            allowed="with --train-backend megatron",
            advice="Use --train-backend megatron, or another estimator.",
        )
    if not draft["compute_advantages_and_returns"]:
        draft.problem(
            "advantage_estimator",
            "its critic learns returns, and --disable-compute-advantages-and-returns leaves them out",
            advice="Leave one of the two out.",
        )
    if draft["train_async"] and not any(draft[name] for name in ("use_rollout_logprobs", "use_tis", "keep_old_actor")):
        draft.problem(
            "advantage_estimator",
            "in asynchronous training responses are of older weights, and the ratio has to know",
            allowed="with --use-rollout-logprobs, --use-tis or --keep-old-actor",
            advice="Give one of these.",
        )
    _check_critic_ranks(draft)
    _check_critic_rate(draft)
    _check_critic_files(draft)


def _check_critic_ranks(draft: Draft) -> None:
    for dest in ("num_nodes", "num_gpus_per_node"):
        own, actor = draft[f"critic_{dest}"], draft[f"actor_{dest}"]
        if own not in (None, actor):
            draft.problem(
                f"critic_{dest}",
                "the critic is in the actor's ranks, where its values are needed",
                allowed=str(actor),
                advice="Leave it out.",
            )
        draft[f"critic_{dest}"] = actor


def _check_critic_rate(draft: Draft) -> None:
    if draft["critic_lr"] is None:
        draft["critic_lr"] = draft["lr"]
    elif draft["min_lr"] > draft["critic_lr"]:
        draft.problem("critic_lr", f"it is below --min-lr {draft['min_lr']}", advice="Raise it, or lower --min-lr.")
    decay = draft["lr_decay_iters"] or (draft["num_rollout"] or 0) * (draft["num_steps_per_rollout"] or 1)
    if draft["lr_decay_style"] != "constant" and decay and draft["critic_lr_warmup_iters"] >= decay:
        draft.problem(
            "critic_lr_warmup_iters",
            f"the rate has decayed after {decay} steps",
            allowed=f"below {decay}",
            advice="Lower it, or raise --lr-decay-iters.",
        )
    if draft["num_critic_only_steps"] and draft["num_critic_only_steps"] >= (draft["num_rollout"] or 0):
        draft.notice("--num-critic-only-steps is as many as the run's rollouts: the actor does not learn")


def _check_critic_files(draft: Draft) -> None:
    if draft["critic_save"] is None and draft["save"]:
        draft["critic_save"] = draft["save"].rstrip("/") + "_critic"
    if draft["critic_save"] and not draft["save"]:
        draft.problem("critic_save", "the actor has no place for checkpoints", advice="Give --save, too.")
    elif draft["critic_save"] and draft["critic_save"].rstrip("/") == draft["save"].rstrip("/"):
        draft.problem("critic_save", "there are the actor's checkpoints", advice="Give another directory.")
    found = draft.directory("critic_load")
    if draft["critic_load"] and not (found.newest or found.steps):
        draft.problem(
            "critic_load",
            "it holds no checkpoint" if found.exists else "there is no such directory",
            allowed="a directory of a critic's checkpoints",
            advice="Correct the path, or leave it out: a critic begins with the actor's layers.",
        )


def _check_distillation(draft: Draft) -> None:
    """``--use-opd``: somebody says how likely the response's tokens are to the teacher."""
    if not draft["use_opd"]:
        for dest in ("opd_type", "opd_teacher_urls", "opd_teacher_load"):
            if draft[dest]:
                draft.problem(
                    dest, "nothing is distilled", advice="Give --use-opd, too, or leave it out.",
                )  # fmt: skip
        return
    if draft["skip_actor_forward_only"] and not draft["use_rollout_logprobs"]:
        _needs_old(draft, "use_opd")
    if draft["opd_type"] is None:
        draft.problem(
            "opd_type",
            "on-policy distillation needs a teacher",
            allowed="sglang or megatron",
            advice="Give --opd-type sglang and the server's address (--rm-url or --opd-teacher-urls), "
            "or --opd-type megatron and --opd-teacher-load.",
        )
    elif draft["opd_type"] == "sglang":
        _check_servers(draft)
    else:
        _check_model(draft)
    if draft["opd_type"] and not draft["rm_type"] and not draft["custom_rm_path"]:
        draft["custom_rm_path"] = TEACHER_REWARD


def _check_servers(draft: Draft) -> None:
    for dest in ("opd_teacher_load", "opd_teacher_ckpt_step"):
        if draft[dest] is not None:
            draft.problem(dest, "the teacher is a server", allowed="with --opd-type megatron", advice="Leave it out.")
    dest = "opd_teacher_urls" if draft["opd_teacher_urls"] else "rm_url"
    # With a reward server, --rm-url is that one's.
    rm_url = None if (draft["rm_type"] or "").removeprefix("boxed_") == "remote_rm" else draft["rm_url"]
    try:
        found = read_teachers(draft["opd_teacher_urls"], rm_url)
    except ValueError as error:
        draft.problem(dest, str(error), allowed="NAME=http://HOST:PORT ...", advice="Correct it.")
        return
    if draft["rollout_temperature"] != 1 and found:
        draft.notice(
            f"the teacher's log-probs are those of temperature 1, the student's of --rollout-temperature "
            f"{draft['rollout_temperature']}; a teacher in the trainer (--opd-type megatron) has the student's"
        )
    fills = ("custom_rm_path", "custom_generate_function_path", "rollout_function_path")
    if not found and draft.generates and not any(draft[name] for name in fills):
        draft.problem(
            "opd_teacher_urls",
            "the teacher has no address",
            allowed="NAME=http://HOST:PORT of an SGLang server",
            advice="Give it, or --rm-url (unless that is the address of --rm-type remote_rm).",
        )


def _check_model(draft: Draft) -> None:
    if draft["opd_teacher_urls"]:
        draft.problem(
            "opd_teacher_urls", "the teacher is a checkpoint", advice="Leave it out, or use --opd-type sglang."
        )
    found = draft.directory("opd_teacher_load")
    chosen = choose_checkpoint(draft, "opd_teacher_load", "opd_teacher_ckpt_step")
    if not draft["opd_teacher_load"]:
        draft.problem("opd_type", "the teacher has no checkpoint", advice="Give --opd-teacher-load.", value="megatron")
    elif chosen is None and not found.checkpoint_error and not (found.config and found.has_weights):
        draft.problem(
            "opd_teacher_load",
            "there is neither a checkpoint nor a Hugging Face model" if found.exists else "there is no such directory",
            allowed="a checkpoint or Hugging Face directory of the actor's architecture",
            advice="Correct the path.",
        )
