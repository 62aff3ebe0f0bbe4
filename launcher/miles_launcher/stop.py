"""``miles stop``: a run ends in good order, as by SIGTERM to its controller, and this waits for that."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from miles_launcher.runs import Run, ask, find_run, order

TIMEOUT_S = 180.0
_POLL_S = 0.1


def stop(name: str | None, *, timeout_s: float = TIMEOUT_S) -> int:
    """Order it, wait, say what has ended. 0: all of it; 1: not within ``timeout_s``.

    Raises:
        NoSuchRun, NoStatus.
        OrderRefused: Its program has no way to be stopped from outside.
    """
    run = find_run(name)
    before = ask(run, "/status")
    watched = dict(_processes(before))
    began = time.monotonic()
    order(run, "/stop", {"by": "miles stop"})
    sys.stdout.write(f"stopping run {run.run_id} (pid {run.pid})\n")
    sys.stdout.flush()
    left = _wait(run, watched, began + timeout_s)
    took = time.monotonic() - began
    if left:
        sys.stderr.write(f"run {run.run_id} has not ended within {timeout_s:g} s; still there: {', '.join(left)}\n")
        return 1
    sys.stdout.write(f"run {run.run_id} has ended after {took:.1f} s: {_what(before)}\n")
    if run.run_dir is not None:
        sys.stdout.write(f"logs: {run.run_dir / 'logs'}\n")
    return 0


def _wait(run: Run, watched: Mapping[str, psutil.Process], deadline: float) -> list[str]:
    """Until nothing of the run is left; else what is, at the deadline."""
    while True:
        left = [what for what, process in watched.items() if _runs(process)]
        if run.is_alive:
            left.insert(0, f"its controller (pid {run.pid})")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)


def _processes(snapshot: Mapping[str, Any]) -> Iterator[tuple[str, psutil.Process]]:
    """The run's processes on this machine, each with its start time, so that a pid that is used again is not it."""
    here = {node["name"] for node in snapshot["nodes"] if _is_here(node)}
    found = [(f"{m['name']}[{r['rank']}]", r) for m in snapshot["meshes"] for r in m["ranks"]]
    found += [(service["name"], service) for service in snapshot["services"]]
    for name, process in found:
        if process["node"] in here and process["pid"]:
            try:
                yield f"{name} (pid {process['pid']})", psutil.Process(process["pid"])
            except psutil.Error:
                continue


def _is_here(node: Mapping[str, Any]) -> bool:
    info = node.get("inventory") or {}
    return info.get("hostname") == socket.gethostname()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _what(snapshot: Mapping[str, Any]) -> str:
    nodes = [node["name"] for node in snapshot["nodes"] if node["state"] in ("alive", "suspect")]
    parts = [f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} ({', '.join(nodes[:8])}{', ...' * (len(nodes) > 8)})"]
    for mesh in snapshot["meshes"]:
        count = len(mesh["ranks"])
        parts.append(f"{mesh['name']} ({count} rank{'s' if count != 1 else ''})")
    parts += [service["name"] for service in snapshot["services"]]
    return ", ".join(parts)
