"""``trace.json`` of a run, read as any reader of JSON does: spans by track, and the time that two of them share."""

from __future__ import annotations

import json
from pathlib import Path


class Trace:
    """Spans as (name, begin, end, arguments) in microseconds, by ``process/track``."""

    def __init__(self, path: Path) -> None:
        events = json.loads(path.read_text())
        named = {(e["pid"], e.get("tid", 0)): e["args"]["name"] for e in events if e["ph"] == "M"}
        self.tracks: dict[str, list[tuple[str, int, int, dict]]] = {}
        for event in events:
            if event["ph"] == "X":
                track = f"{named[event['pid'], 0]}/{named[event['pid'], event['tid']]}"
                span = (event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
                self.tracks.setdefault(track, []).append(span)

    def spans(self, track: str, name: str | None = None) -> list[tuple[int, int]]:
        """When something (of that name) went on."""
        return [(begin, end) for of, begin, end, _ in self.tracks.get(track, []) if name in (None, of)]

    def shared_s(self, one: list[tuple[int, int]], other: list[tuple[int, int]]) -> float:
        """Seconds in which a span of each went on."""
        return sum(max(0, min(e, f) - max(b, c)) for b, e in one for c, f in other) / 1e6


def generating_while_training(run_dir: Path) -> float:
    """Seconds in which engines worked on requests while the trainer worked on a rollout."""
    trace = Trace(run_dir / "trace.json")
    requests, training = trace.spans("engines/requests"), trace.spans("trainer/rank 0", "train")
    assert requests
    assert training
    return trace.shared_s(requests, training)
