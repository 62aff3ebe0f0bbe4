"""Rules: low-rank adapters (``--lora-rank``): which layers have one, and that checkpoints and adapters fit."""

from __future__ import annotations

from miles.flags.draft import Draft
from miles.flags.facts import CheckpointFacts
from miles.utils.lora import ALL_LINEAR, MODULES, target_modules, unknown_modules

_NAMES = f"{ALL_LINEAR}, or some of {','.join(MODULES)}"
_MLP = {"gate_proj", "up_proj", "down_proj"}


def resolve_lora(draft: Draft) -> None:
    """Of runs that train adapters."""
    if not draft["lora_rank"] or not draft.trains:
        return
    targets = _targets(draft)
    if not targets:
        return
    cut = draft["expert_tensor_parallel_size"]
    if draft["num_experts"] and cut > 1 and _MLP & set(targets):
        draft.problem(
            "expert_tensor_parallel_size",
            "experts with adapters cannot be cut",
            allowed="1, or --target-modules q_proj,k_proj,v_proj,o_proj",
            advice="Leave it out, and share experts by --expert-model-parallel-size.",
        )
    if draft["ref_update_interval"] is not None and draft["use_kl_loss"] | bool(draft["kl_coef"]):
        draft.problem(
            "ref_update_interval",
            "with --lora-rank the reference is the model without its adapter, which does not move",
            advice="Leave one of the two out.",
        )
    if draft["enable_mtp_training"]:
        draft.problem(
            "enable_mtp_training",
            "layers that predict further tokens have no adapters, and with --lora-rank nothing else is trained",
            advice="Leave it out.",
        )
    if draft["lora_adapter_path"]:
        _check_adapter(draft, targets)


def _targets(draft: Draft) -> tuple[str, ...]:
    if not draft["target_modules"]:
        draft.problem(
            "target_modules", "--lora-rank needs it", allowed=_NAMES, advice=f"Give --target-modules {ALL_LINEAR}."
        )
        return ()
    for dest in ("target_modules", "exclude_modules"):
        if unknown := unknown_modules(draft[dest]):
            draft.problem(
                dest,
                f"{', '.join(unknown)}: no such linear layer can have an adapter",
                allowed=_NAMES,
                advice="Correct it, with commas between names and no spaces.",
            )
            return ()
    targets = target_modules(draft["target_modules"], draft["exclude_modules"])
    if not targets:
        draft.problem(
            "exclude_modules", "it leaves no layer with an adapter", allowed=_NAMES, advice="Exclude fewer of them."
        )
    return targets


def _check_adapter(draft: Draft, targets: tuple[str, ...]) -> None:
    """``adapter_config.json`` says the same as the flags."""
    if draft.facts.adapter is None:
        draft.problem(
            "lora_adapter_path",
            draft.facts.adapter_error,
            allowed="a directory with adapter_config.json and adapter_model.safetensors",
            advice="Give what peft, or a run of ours below its checkpoints, has written.",
        )
        return
    found = draft.facts.adapter
    listed = found.get("target_modules")
    wanted = {
        "lora_rank": (found.get("r"), draft["lora_rank"]),
        "lora_alpha": (found.get("lora_alpha"), draft["lora_alpha"]),
        "target_modules": (sorted(listed) if isinstance(listed, list) else listed, sorted(targets)),
    }
    for dest, (theirs, ours) in wanted.items():
        if theirs != ours:
            draft.problem(
                "lora_adapter_path",
                f"it was made with {theirs}, and {draft.flag(dest)} says {ours}",
                allowed="an adapter of the same rank, scale and layers",
                advice=f"Give {draft.flag(dest)} as it was made with.",
            )


def check_kind(draft: Draft, dest: str, found: CheckpointFacts, path: str) -> None:
    """A checkpoint of an adapter goes on as one, and is no model by itself."""
    if dest != "load":
        if found.adapter:
            draft.problem(
                dest,
                "it holds an adapter, without the weights below",
                allowed="a checkpoint of whole weights, or a Hugging Face directory",
                advice="Make whole weights of it with `miles convert`.",
                value=path,
            )
    elif found.adapter and not draft["lora_rank"]:
        draft.problem(
            dest,
            "it holds an adapter, and --lora-rank is not given",
            allowed="a checkpoint of whole weights",
            advice="Give --lora-rank and what belongs to it, or make whole weights of it with `miles convert`.",
            value=path,
        )
    elif draft["lora_rank"] and not found.adapter and found.rollout_id is not None and not draft["finetune"]:
        draft.problem(
            dest,
            "it holds whole weights, and with --lora-rank an adapter goes on",
            allowed="a checkpoint of an adapter",
            advice="Give --finetune to begin an adapter on these weights, or leave --lora-rank out.",
            value=path,
        )
