"""IFBench: whether a response follows each of its prompt's instructions.

Reads ``metadata["instruction_id_list"]``, ``["kwargs"]``, ``["prompt_text"]`` and ``["record_id"]`` of a row. Its
checks are in ``ifbench_checks``; nothing is fetched when it is imported, or later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from miles.rollout.rm_hub.ifbench_checks import BadInstruction, Instruction, find
from miles_agents.errors import ConfigError

_COLUMNS = "The row's metadata needs instruction_id_list, and kwargs with an object for each of them."


class CannotCheck(ConfigError, ValueError):
    """A row's instructions cannot be checked: one is unknown, refused, or lacks an argument."""

    code = "E-ROLL-023"


def compute_ifbench_reward(response: str | None, label: Any, metadata: Mapping[str, Any] | None = None) -> float:
    """1.0 if a response follows all instructions of its row, else 0.0; an empty response follows none.

    Args:
        response: All of it; nothing is taken out.
        label: Not looked at.
        metadata: Of the row.

    Raises:
        CannotCheck.
    """
    wanted = _told(metadata)
    if response is None or not response.strip():
        return 0.0
    return float(all(instruction.check(response, **arguments) for instruction, arguments in wanted))


async def ifbench_reward(response: str, metadata: Mapping[str, Any] | None) -> float:
    """``compute_ifbench_reward`` beside the event loop: a long response takes milliseconds."""
    return await asyncio.to_thread(compute_ifbench_reward, response, None, metadata)


def why_not_checked(metadata: Any) -> str:
    """What is wrong with a row's metadata; empty: its instructions can be checked."""
    try:
        instructions_of(metadata)
    except BadInstruction as error:
        return f"{_record(metadata)}{error}"
    return ""


def instructions_of(metadata: Any) -> list[tuple[Instruction, dict[str, Any]]]:
    """A row's instructions with their arguments.

    Raises:
        BadInstruction: They cannot be checked.
    """
    if not isinstance(metadata, Mapping):
        raise BadInstruction("there are no instructions", _COLUMNS)
    ids = metadata.get("instruction_id_list")
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, list) or not ids:
        raise BadInstruction("there are no instructions: 'instruction_id_list' is not a list of ids", _COLUMNS)
    if odd := next((name for name in ids if not isinstance(name, str)), None):
        raise BadInstruction(f"'instruction_id_list' has {odd!r}, which is no id", _COLUMNS)
    prompt = metadata.get("prompt_text")
    prompt = prompt if isinstance(prompt, str) else ""
    given = _spread(metadata.get("kwargs"), len(ids))
    found = []
    for name, entry in zip(ids, given, strict=True):
        instruction = find(name.strip())
        found.append((instruction, instruction.arguments(entry, prompt)))
    return found


def _spread(given: Any, count: int) -> list[Mapping[str, Any]]:
    """Arguments for each of ``count`` instructions: a list has them one by one, an object has those of all."""
    if not given:
        return [{}] * count
    entries = given if isinstance(given, list) else [given]
    entries = [{} if entry is None else entry for entry in entries]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise BadInstruction("'kwargs' is neither an object nor a list of objects", _COLUMNS)
    if len(entries) not in (1, count):
        raise BadInstruction(f"'kwargs' has {len(entries)} entries for {count} instructions", _COLUMNS)
    return entries * (count // len(entries))


def _told(metadata: Any) -> list[tuple[Instruction, dict[str, Any]]]:
    try:
        return instructions_of(metadata)
    except BadInstruction as error:
        raise CannotCheck(
            f"a row's instructions cannot be checked by ifbench: {_record(metadata)}{error}",
            evidence=f"its metadata: {str(metadata)[:500]}",
            advice=error.advice,
            flag="--rm-type",
        ) from error


def _record(metadata: Any) -> str:
    number = metadata.get("record_id") if isinstance(metadata, Mapping) else None
    return "" if number is None else f"record {number}: "
