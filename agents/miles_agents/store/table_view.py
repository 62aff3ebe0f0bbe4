"""What a person should know of a pool: who put what, how old it is, who maps it."""

from __future__ import annotations

from typing import Any

from miles_agents.store.errors import NoMemory, ObjectTooLarge, StoreFull
from miles_agents.store.ref import show_bytes
from miles_agents.store.table import PoolTable, Refuse, Segment

_SHOWN = 10


def facts_of(table: PoolTable) -> dict[str, int]:
    """Numbers for beats and status. ``held_bytes`` counts free segments too."""
    return {
        "used_bytes": table.used_bytes,
        "held_bytes": table.total_bytes,
        "limit_bytes": table.limit_bytes,
        "objects": len(table.objects),
        "holders": table.num_holds,
        "waiting": table.num_waiting,
    }


def describe_segments(table: PoolTable, now: float) -> list[str]:
    """One line for each of the largest segments that are not free."""
    busy = sorted((s for s in table.segments.values() if s.state != "free"), key=lambda s: -s.capacity)
    lines = [_line(segment, now) for segment in busy[:_SHOWN]]
    if len(busy) > _SHOWN:
        rest = sum(segment.capacity for segment in busy[_SHOWN:])
        lines.append(f"{len(busy) - _SHOWN} more with {show_bytes(rest)}")
    return lines


def _line(segment: Segment, now: float) -> str:
    size, age = show_bytes(segment.capacity), f"{now - segment.since:.0f} s"
    who = segment.owner.label if segment.owner is not None else "somebody who is gone"
    if segment.state == "making":
        return f"{size} being made by the system for {age}"
    if segment.state == "allocated":
        return f"{size} being written by {who} for {age}"
    if segment.state == "closing":
        return f"{size} being given back"
    left = sum(not stored.removed for stored in segment.objects)
    mappers = sorted({owner.label for stored in segment.objects for owner in stored.holds.values()})
    shown = ", ".join(mappers[:_SHOWN]) + (f" and {len(mappers) - _SHOWN} more" if len(mappers) > _SHOWN else "")
    numbers = [str(stored.key.number) for stored in segment.objects if not stored.removed]
    what = f"object {numbers[0]}" if left == 1 else f"{left} objects ({numbers[0]} to {numbers[-1]})" if left else ""
    state = what or f"removed ({len(segment.objects)} objects)"
    return f"{size} put by {who} {age} ago: {state}, mapped by {shown or 'nobody'}"


def store_full(table: PoolTable, refuse: Refuse, nbytes: int, node: str, now: float) -> StoreFull | NoMemory:
    """The error for who got no room."""
    if refuse.why:
        return NoMemory(
            f"there is no memory on {node} for an object of {show_bytes(nbytes)}",
            evidence=f"{refuse.why}; the store has {show_bytes(table.total_bytes)} of {show_bytes(table.limit_bytes)}",
            advice="Free memory on the node, or give the store less with --store-bytes so that it waits in time.",
            nbytes=nbytes,
        )
    lines = describe_segments(table, now)
    head = (
        f"{show_bytes(table.used_bytes)} of {show_bytes(table.limit_bytes)} in use, "
        f"{table.num_used} of {table.max_segments} segments; waited {refuse.waited_s:.1f} s; "
        f"{refuse.num_waiting} others wait"
    )
    advice = "Remove objects that are done with, drop arrays that still map removed ones, or raise --store-bytes."
    if table.num_used >= table.max_segments:
        advice = (
            "There is memory, but each put takes a segment of its own: put many small values as one, or together with "
            "put_parts; remove objects that are done with, or let the agent open more files (ulimit -n)."
        )
    return StoreFull(
        f"the store of {node} has no room for {show_bytes(nbytes)}",
        evidence="\n".join([head, *lines]),
        advice=advice,
        nbytes=nbytes,
        node=node,
    )


def too_large(table: PoolTable, nbytes: int, node: str) -> ObjectTooLarge:
    """The error for what could never fit."""
    return ObjectTooLarge(
        f"an object of {show_bytes(nbytes)} does not fit into the store of {node}",
        evidence=f"all of the store has {show_bytes(table.limit_bytes)}",
        advice="Put it in parts that are removed one by one, or raise --store-bytes.",
        nbytes=nbytes,
        limit=table.limit_bytes,
    )


def status_of(table: PoolTable, now: float) -> dict[str, Any]:
    """Facts, how many segments are in use and how many there may be, and lines, for the agent's status."""
    numbers = {**facts_of(table), "num_segments": table.num_used, "max_segments": table.max_segments}
    return {**numbers, "segments": describe_segments(table, now)}
