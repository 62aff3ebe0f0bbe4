"""Rules: evaluation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from miles.flags.draft import Draft
from miles.flags.facts import NAMED_FILES
from miles.flags.prompt_facts import DataFacts
from miles.flags.ranges import RANGES
from miles.flags.rules_data import check_file, context_limit, missing_column, needs_label
from miles.utils.eval_config import EvalDatasetConfig, read_entries, resolve_entries


def resolve_eval(draft: Draft) -> None:
    """Evaluation has data, and what it does not say is as in rollouts."""
    for name in ("temperature", "top_p", "top_k", "max_response_len"):
        if draft[f"eval_{name}"] is None:
            draft[f"eval_{name}"] = draft[f"rollout_{name}"]
    for name in ("input_key", "label_key", "tool_key"):
        if draft[f"eval_{name}"] is None:
            draft[f"eval_{name}"] = draft[name]
    if len(draft["eval_prompt_data"] or ()) == 1:
        draft["eval_prompt_data"] = ["aime", *draft["eval_prompt_data"]]
        draft.notice("--eval-prompt-data has a path and no name: it is called aime, as ever")
    if draft.facts.eval_error:
        draft.problem(
            "eval_config" if draft["eval_config"] else "eval_prompt_data",
            draft.facts.eval_error,
            allowed="a YAML file with eval.datasets" if draft["eval_config"] else "NAME PATH NAME PATH ...",
            advice="Correct the file." if draft["eval_config"] else "Give a name before each path.",
        )
    _check_eval_sets(draft)
    for dest in NAMED_FILES:
        if draft[dest] in draft.facts.missing_files:
            draft.problem(dest, "there is no such file", allowed="a file", advice="Correct the path.")
    if draft["eval_interval"] is not None:
        _check_eval(draft)


def _check_eval_sets(draft: Draft) -> None:
    """Files and columns; and the settings of each data set, as the run uses them, become ``eval_datasets``."""
    dest = "eval_config" if draft["eval_config"] else "eval_prompt_data"
    without_label: set[str] = set()
    for found in draft.facts.eval_sets:
        facts = draft.facts.data.get(found.path, DataFacts())
        if not check_file(draft, dest, found.path, facts):
            continue
        key = found.label_key
        is_default = key == draft["eval_label_key"] and "eval_label_key" not in draft.typed
        if key in facts.absent and is_default and not needs_label(draft):
            without_label.add(found.path)
            key = None
        for column, flag in ((found.input_key, "eval_input_key"), (key, "eval_label_key")):
            if column and column in facts.absent:
                missing_column(draft, flag, column, found.path, facts)
    if draft.facts.eval_error or len(draft["eval_prompt_data"] or ()) % 2:
        return
    sets = resolve_entries(draft.values, draft.facts.eval_file or read_entries({**draft.values, "eval_config": None}))
    for one in sets:
        if one.path in without_label:
            one.label_key = None
        one.path = str(PurePosixPath(draft.facts.cwd) / one.path)
    draft["eval_datasets"] = [asdict(one) for one in sets]
    _check_settings(draft, sets)


_RANGES = {
    "n_samples_per_eval_prompt": RANGES["n_samples_per_eval_prompt"],
    "temperature": RANGES["eval_temperature"],
    "top_p": RANGES["eval_top_p"],
    "max_response_len": RANGES["eval_max_response_len"],
    "min_new_tokens": RANGES["eval_min_new_tokens"],
    "max_prompt_len": RANGES["eval_max_prompt_len"],
    "max_context_len": RANGES["eval_max_context_len"],
}
"""Of what a file of ``--eval-config`` may set: those of the flags."""


def _check_settings(draft: Draft, sets: list[EvalDatasetConfig]) -> None:
    """What a file says of its data sets is in the ranges of the flags, fits into the model, and names code there is."""
    defaults, entries = draft.facts.eval_file or ({}, [])
    limit = context_limit(draft)
    for one, entry in zip(sets, entries, strict=False):
        given = {**defaults, **entry}
        for name, (low, high, allowed) in _RANGES.items():
            value = given.get(name)
            if value is not None and not low <= value <= high:
                _refuse(draft, one.name, (name, value), "is out of range", allowed)
        top_k = given.get("top_k")
        if top_k is not None and top_k != -1 and top_k < 1:
            _refuse(draft, one.name, ("top_k", top_k), "is out of range", "1 or more, or -1 for no truncation")
        context = given.get("max_context_len")
        if limit and context is not None and context > limit:
            _refuse(draft, one.name, ("max_context_len", context), f"the context has {limit} tokens", f"up to {limit}")
        path = given.get("custom_generate_function_path")
        if path and (why := draft.facts.hook_errors.get(path)):
            _refuse(draft, one.name, ("custom_generate_function_path", path), why, "module.function")


def _refuse(draft: Draft, name: str, given: tuple[str, Any], what: str, allowed: str) -> None:
    setting, value = given
    draft.problem(
        "eval_config",
        f"evaluation data {name}: {setting} {value}: {what}",
        allowed=allowed,
        advice=f"Correct {setting} in the file.",
    )


def _check_eval(draft: Draft) -> None:
    if not draft["eval_prompt_data"] and not draft["eval_config"] and not draft["eval_function_path"]:
        draft.problem(
            "eval_interval",
            "there is no evaluation data",
            advice="Give --eval-prompt-data NAME PATH, or --eval-config.",
        )
    if draft["group_rm"]:
        draft.problem("group_rm", "evaluations need a reward for each sample", advice="Remove it, or --eval-interval.")
    if not draft.generates:
        draft.problem(
            "eval_interval", "without engines nothing can be evaluated", advice="Remove it, or what turns engines off."
        )
