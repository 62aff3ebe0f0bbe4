"""Rules: which runs can replay the routing of experts."""

from __future__ import annotations

from miles.flags.draft import Draft

_OWN, _ENGINES = "use_routing_replay", "use_rollout_routing_replay"


def resolve_replay(draft: Draft) -> None:
    """That there are experts, and something that records which of them tokens are given to."""
    asked = _ENGINES if draft[_ENGINES] else _OWN
    if not draft[asked]:
        return
    draft[_OWN] = True
    if draft["hf_checkpoint"] and draft.directory("hf_checkpoint").config and not draft["num_experts"]:
        draft.problem(asked, "the model has no experts", advice="Leave it out, or correct --hf-checkpoint.")
    elif draft["loss_type"] == "sft_loss":
        draft.problem(
            asked, "supervised fine-tuning has no pass before, and no engine, that routes", advice="Leave it out."
        )
    elif asked == _OWN and draft.trains:
        _check_pass(draft)


def _check_pass(draft: Draft) -> None:
    """The trainer's own recording is made in the pass over old log-probs."""
    for dest in ("skip_actor_forward_only", "use_rollout_logprobs"):
        if draft[dest]:
            draft.problem(
                _OWN,
                f"with {draft.flag(dest)} there is no pass over old log-probs, whose routing it replays",
                advice=f"Leave {draft.flag(dest)} out, or give --use-rollout-routing-replay: engines record, too.",
            )
