"""Rules: who gives rewards, and what of them is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from urllib.parse import urlsplit

from miles.flags.draft import Draft
from miles.flags.group_reward import DICT_REWARDS, NO_BOX_IN_A_BOX, NUMBER_REWARDS, REWARDS, WORD_FOR_WORD
from miles.flags.problems import listed
from miles.flags.prompt_facts import DataFacts


def resolve_reward(draft: Draft) -> None:
    """Somebody gives rewards, one that there is, and what it gives can be used."""
    kind = draft["rm_type"]
    if kind is not None:
        _check_kind(draft, "rm_type", kind)
    for found in draft.facts.eval_sets:
        if found.rm_type is not None and not draft["custom_rm_path"]:
            _check_kind(draft, "eval_config", found.rm_type, f"evaluation data {found.path}: ")
    _check_address(draft)
    _check_somebody(draft)
    if plain_kind(kind) in WORD_FOR_WORD and not kind.strip().startswith("boxed_") and draft.generates:
        _tell_end_token(draft)
    if draft.generates and not draft["custom_rm_path"]:
        _check_key(draft, plain_kind(kind))
    if draft["eps_clip_high"] is None:
        draft["eps_clip_high"] = draft["eps_clip"]
    if draft["eval_reward_key"] is None:
        draft["eval_reward_key"] = draft["reward_key"]


def plain_kind(kind: str | None) -> str:
    """A reward's name without ``boxed_``; empty: none is named."""
    return (kind or "").strip().removeprefix("boxed_")


def asks_remote(draft: Draft) -> bool:
    """Whether ``--rm-url`` may be asked: rows, evaluations and user code may name their reward, too; a teacher may be
    there."""
    kinds = [draft["rm_type"], *(found.rm_type for found in draft.facts.eval_sets)]
    others = draft["custom_rm_path"] or (draft["use_opd"] and draft["opd_type"] == "sglang")
    return "remote_rm" in map(plain_kind, kinds) or _metadata_may_tell(draft) or bool(others)


def _check_kind(draft: Draft, dest: str, kind: str, where: str = "") -> None:
    plain = plain_kind(kind)
    if plain not in REWARDS:
        near = difflib.get_close_matches(plain, REWARDS, 1, 0.5)
        hint = f"Did you mean {'boxed_' if kind.strip().startswith('boxed_') else ''}{near[0]}? " if near else ""
        draft.problem(
            dest,
            f"{where}there is no such reward",
            allowed=f"{listed(REWARDS)}; also with boxed_ before it",
            advice=f"{hint}Use one of these, or a function of yours with --custom-rm-path.",
            value=kind,
        )
    elif plain in NO_BOX_IN_A_BOX and plain != kind.strip():
        draft.notice(
            f"{draft.flag(dest)} {kind}: {plain} looks for a box, or for words before the answer, in what the last box "
            f"of a response holds, so that hardly any response is right; {plain} alone finds the answer itself"
        )


def _tell_end_token(draft: Draft) -> None:
    if not draft["rollout_skip_special_tokens"]:
        draft.notice(
            f"--rm-type {draft['rm_type']} compares words, and the token that ends a response belongs to the last; "
            "--rollout-skip-special-tokens leaves it out"
        )


def _check_address(draft: Draft) -> None:
    kinds = [draft["rm_type"], *(found.rm_type for found in draft.facts.eval_sets)]
    needed = "remote_rm" in map(plain_kind, kinds)
    url = draft["rm_url"]
    if needed and not url:
        draft.problem("rm_type", "it needs an address", advice="Give --rm-url.", value="remote_rm")
    if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        draft.problem(
            "rm_url",
            "it is no address of an HTTP server",
            allowed="http://HOST:PORT/PATH, or https",
            advice="Write the whole address.",
        )


def _check_somebody(draft: Draft) -> None:
    replaced = draft["rollout_function_path"] or draft["custom_generate_function_path"]
    from_data = draft["load_debug_rollout_data"] or draft["loss_type"] == "sft_loss" or _metadata_may_tell(draft)
    if draft.generates and not draft["rm_type"] and not draft["custom_rm_path"] and not replaced and not from_data:
        draft.problem(
            "rm_type",
            "nothing gives rewards",
            allowed=f"{listed(REWARDS)}, or --custom-rm-path",
            advice="Give --rm-type or --custom-rm-path.",
        )


def _check_key(draft: Draft, kind: str) -> None:
    """Training needs a number: the reward, or an entry of it."""
    key = draft["reward_key"]
    if kind in DICT_REWARDS:
        keys = DICT_REWARDS[kind]
        replaced = draft["custom_reward_post_process_path"] or draft["custom_convert_samples_to_train_data_path"]
        if key is None and not replaced and not draft["rollout_function_path"]:
            draft.problem(
                "reward_key",
                f"--rm-type {draft['rm_type']} gives several values for each sample",
                allowed=listed(keys),
                advice=f"Give --reward-key {keys[0]}.",
            )
        for dest in ("reward_key", "eval_reward_key"):
            if draft[dest] is not None and draft[dest] not in keys and not _others_may_tell(draft, dest):
                _no_such_key(draft, dest, keys)
    elif key is not None and kind in NUMBER_REWARDS and not _others_may_tell(draft, "reward_key"):
        draft.problem(
            "reward_key",
            f"--rm-type {draft['rm_type']} gives a plain number for each sample",
            allowed="none",
            advice="Leave it out.",
        )


def _no_such_key(draft: Draft, dest: str, keys: Iterable[str]) -> None:
    draft.problem(
        dest,
        f"--rm-type {draft['rm_type']} gives no such number",
        allowed=listed(keys),
        advice="Use one of these.",
    )


def _others_may_tell(draft: Draft, dest: str) -> bool:
    """Rewards of another type may come, too: from rows or generate functions; for evaluations also from their data."""
    functions = draft["custom_generate_function_path"] or draft["rollout_function_path"]
    return bool(functions) or _metadata_may_tell(draft) or (dest == "eval_reward_key" and bool(draft.facts.eval_sets))


def _metadata_may_tell(draft: Draft) -> bool:
    """A row's metadata may name its reward (``rm_type``)."""
    facts = draft.facts.data.get(draft["prompt_data"] or "", DataFacts())
    return draft["metadata_key"] in facts.columns
