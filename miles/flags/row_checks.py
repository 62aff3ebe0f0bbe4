"""What rows of prompts have to hold so that they can be rewarded, told before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

SFT_ROLLOUT = "miles.rollout.sft_rollout.generate_rollout"


class RowChecks(TypedDict, total=False):
    """What ``Columns`` takes."""

    label_check: Callable[[Any], str] | None
    metadata_check: Callable[[Any], str] | None
    rewards_by_metadata: bool
    is_learnt: bool


def row_checks(rm_type: str | None, custom_rm_path: str | None, added: Mapping[str, Any] | None = None) -> RowChecks:
    """What tells that a row is of no use to its reward.

    Args:
        rm_type: The reward of rows that name none.
        custom_rm_path: A function that rewards all rows, whatever they name.
        added: Put into each row's metadata, over what is there.
    """
    if custom_rm_path:
        return {}
    return {
        "label_check": label_check(rm_type),
        "metadata_check": metadata_check(rm_type, added or {}),
        "rewards_by_metadata": _plain(rm_type) == "ifbench",
    }


def training_checks(values: Mapping[str, Any]) -> RowChecks:
    """For the prompts of training, by the flags: what is supervised has no reward, and something to learn."""
    supervised = values.get("rollout_function_path") in (None, SFT_ROLLOUT)
    if values.get("loss_type") == "sft_loss" and supervised and not values.get("load_debug_rollout_data"):
        return {"is_learnt": True}
    return row_checks(values.get("rm_type"), values.get("custom_rm_path"))


def label_check(rm_type: str | None) -> Callable[[Any], str] | None:
    """What tells that a label cannot be used with a reward; None: any label can."""
    if _plain(rm_type) != "dapo":
        return None
    from miles.rollout.rm_hub.math_dapo_utils import whole_number

    def check(label: Any) -> str:
        try:
            whole_number(label)
        except ValueError:
            return "a number, as --rm-type dapo needs"
        return ""

    return check


def metadata_check(rm_type: str | None, added: Mapping[str, Any]) -> Callable[[Any], str]:
    """What tells that a row's metadata is of no use to the row's reward: ``rm_type``, or the one that it names."""

    def check(metadata: Any) -> str:
        found = {**(metadata or {}), **added}
        if _plain(found.get("rm_type") or rm_type) != "ifbench":
            return ""
        from miles.rollout.rm_hub.ifbench import why_not_checked

        why = why_not_checked(found)
        return f"one that ifbench cannot check: {why}" if why else ""

    return check


def _plain(kind: Any) -> str:
    return str(kind or "").strip().removeprefix("boxed_")
