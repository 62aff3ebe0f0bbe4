"""Rules: layers that predict further tokens."""

from __future__ import annotations

from miles.flags.architecture import UnknownArchitecture, family
from miles.flags.draft import Draft

_LAYERS, _TRAINS = "mtp_num_layers", "enable_mtp_training"


def resolve_mtp(draft: Draft) -> None:
    """That the model has as many, and that they can be where they have to."""
    _check_backend(draft)
    if draft[_TRAINS] and not draft[_LAYERS]:
        draft.problem(_TRAINS, "there are no such layers", allowed="with --mtp-num-layers", advice="Give it, too.")
    if not draft[_LAYERS]:
        return
    config = draft["hf_config"]
    if config is not None:
        there = int(config.get("num_nextn_predict_layers") or 0) if _kind(draft) == "mimo" else 0
        if draft[_LAYERS] != there:
            has = there or "none of ours"
            draft.problem(
                _LAYERS,
                f"the model of --hf-checkpoint has {has}",
                allowed=f"0 or {there}" if there else "0; layers of MiMo are known",
                advice="Correct it, or leave it out.",
            )
    if draft.trains:
        _check_places(draft)


def _kind(draft: Draft) -> str | None:
    try:
        return family(draft["hf_config"])
    except UnknownArchitecture:
        return None


def _check_backend(draft: Draft) -> None:
    if draft.trains and draft["hf_config"] is not None and draft["train_backend"] == "fsdp" and _kind(draft) == "mimo":
        draft.problem(
            "train_backend", "not built yet: MiMo on the FSDP backend", allowed="megatron", advice="Leave it out."
        )


def _check_places(draft: Draft) -> None:
    if draft["train_backend"] == "fsdp":
        draft.problem(_LAYERS, "only the Megatron backend has them", allowed="0", advice="Leave it out.")
    if draft["pipeline_model_parallel_size"] != 1:
        draft.problem(
            _LAYERS,
            "not built yet: with pipeline stages, the last of which would need the first one's embedding",
            allowed="0",
            advice="Leave it out, or use --pipeline-model-parallel-size 1.",
        )
    if draft["custom_model_provider_path"]:
        draft.problem(
            _LAYERS,
            "a model of your own has layers of its own",
            allowed="0",
            advice="Leave it out, or leave --custom-model-provider-path out.",
        )
    if draft["mtp_loss_scaling_factor"] < 0:
        draft.problem("mtp_loss_scaling_factor", "they would unlearn", allowed="0 or more", advice="Raise it.")
