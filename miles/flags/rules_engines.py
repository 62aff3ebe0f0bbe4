"""Rules: what the run's flags mean for SGLang's own, and which of those it cannot serve."""

from __future__ import annotations

from pathlib import PurePosixPath

from miles.flags.draft import Draft

_NOT_SERVED = ("sglang_pp_size", "sglang_dp_size")
_PREFILL_GRAPHS = "sglang_cuda_graph_backend_prefill"
_ABOUT_PREFILL_GRAPHS = (
    _PREFILL_GRAPHS,
    "sglang_cuda_graph_config",
    "sglang_disable_prefill_cuda_graph",
    "sglang_disable_cuda_graph",
)


def resolve_engines(draft: Draft) -> None:
    """Values of ``--sglang-*`` flags that follow from others; what was typed stays."""
    if not draft.generates:
        return
    for dest in _NOT_SERVED:
        if draft.values.get(dest) not in (None, 1):
            draft.problem(
                dest,
                "not built yet: weight updates reach engines that are tensor parallel only",
                allowed="1",
                advice="Leave it out, and use more engines: --rollout-num-gpus.",
            )
    if draft["chat_template_path"]:
        # User code that asks an engine for chats is answered in the same template.
        draft.values.setdefault(
            "sglang_chat_template", str(PurePosixPath(draft.facts.cwd) / draft["chat_template_path"])
        )
    if draft["colocate"] and draft["device"] == "cuda":
        _without_prefill_graphs(draft)


def _without_prefill_graphs(draft: Draft) -> None:
    """They keep memory that the trainer needs."""
    if not any(draft.values.get(dest) for dest in _ABOUT_PREFILL_GRAPHS):
        draft[_PREFILL_GRAPHS] = "disabled"
    elif draft.values.get(_PREFILL_GRAPHS) not in (None, "disabled"):
        draft.notice(
            f"{draft.flag(_PREFILL_GRAPHS)} {draft[_PREFILL_GRAPHS]}: graphs of prefills keep memory that the trainer, "
            "which shares these GPUs, may need"
        )
