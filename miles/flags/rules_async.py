"""Rules: asynchronous training, where engines generate while the trainer trains."""

from __future__ import annotations

from miles.flags.draft import Draft


def resolve_async(draft: Draft) -> None:
    """What ``train_async.py`` and ``--fully-async`` go together with."""
    if draft["fully_async"] and not draft["train_async"]:
        draft.problem(
            "fully_async",
            "train.py generates and trains in turns",
            advice="Start train_async.py with it, which takes the same flags.",
        )
    if not draft["train_async"]:
        return
    if draft["colocate"]:
        draft.problem(
            "colocate",
            "trainer and engines work at the same time, and cannot share devices",
            advice="Leave it out and give --rollout-num-gpus, or use train.py.",
        )
    if not (draft.trains and draft.generates):
        draft["train_async"] = False
        draft.notice("one side of the run is left out, so nothing overlaps: it goes on as with train.py")
        return
    if draft["true_on_policy_mode"]:
        draft.problem(
            "true_on_policy_mode",
            "answers are generated with weights from before the steps that are taken meanwhile: none is on-policy",
            advice="Use train.py, or leave it out.",
        )
    if draft["fully_async"]:
        _fully_async(draft)


def _fully_async(draft: Draft) -> None:
    reasons = {
        "rollout_function_path": "the function of --fully-async takes its place",
        "partial_rollout": "no answer is stopped at the end of a rollout",
        "rollout_all_samples_process_path": "there is no moment at which all samples of a rollout are known",
        "keep_old_actor": "answers have tokens of several weight versions (--use-rollout-logprobs does it exactly)",
    }
    for dest, why in reasons.items():
        if draft[dest]:
            draft.problem(dest, f"{why} with --fully-async", advice="Leave one of the two out.")
    if draft["pause_generation_mode"] == "abort":
        draft.problem(
            "pause_generation_mode",
            "a weight update would end all answers under way",
            allowed="retract, in_place",
            advice="Choose one of these.",
        )
    samples, group = draft["async_max_concurrent_samples"], draft["n_samples_per_prompt"]
    if samples is not None and samples < group:
        draft.problem(
            "async_max_concurrent_samples",
            "not even one prompt's samples fit",
            allowed=f"{group} or more (--n-samples-per-prompt)",
            advice="Give a larger number, or leave it out.",
        )
