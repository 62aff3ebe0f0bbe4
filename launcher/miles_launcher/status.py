"""``miles status``: what a run does, as tables or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from miles_launcher.runs import ask, find_run

_SHOWN_EVENTS = 15


def print_status(run: str | None, *, as_json: bool) -> None:
    """Print the snapshot of ``run``, or of the only one there is. Raises NoSuchRun, NoStatus."""
    snapshot = ask(find_run(run), "/status")
    if as_json:
        sys.stdout.write(json.dumps(snapshot) + "\n")
    else:
        Console().print(render(snapshot))


def render(snapshot: Mapping[str, Any]) -> RenderableType:
    """The snapshot (``miles_controller.snapshot``) as tables: nodes, ranks with what they are at, services, events."""
    now = float(snapshot["at"])
    parts: list[RenderableType] = [Text(f"{snapshot['run_id']}  agents dial {snapshot['address']}", style="bold")]
    if snapshot.get("run_dir"):
        parts.append(Text(f"directory {snapshot['run_dir']}", overflow="fold"))
    if snapshot.get("job"):
        parts.append(_job(snapshot["job"]))
    parts.append(_nodes(snapshot["nodes"]))
    zygotes = [(node["name"], zygote) for node in snapshot["nodes"] for zygote in node.get("zygotes", [])]
    if zygotes:
        parts.append(_zygotes(zygotes))
    parts += [_mesh(mesh) for mesh in snapshot["meshes"]]
    if snapshot["services"]:
        parts.append(_services(snapshot["services"]))
    if snapshot["locks"]:
        rows = [(name, lock["holder"], lock["waiting"]) for name, lock in snapshot["locks"].items()]
        parts.append(_table("locks", ("name", "holder", "waiting"), rows))
    events = [(_ago(now - e["at"]), e["subject"], e["text"]) for e in snapshot["events"][-_SHOWN_EVENTS:]]
    if events:
        parts.append(_table("last events", ("ago", "subject", "what"), events))
    return Group(*(part for pair in zip(parts, [Text()] * len(parts), strict=True) for part in pair))


def _job(job: Mapping[str, Any]) -> Text:
    """How far the training job is: ``miles.tracking.narrator.RunProgress`` as plain values."""
    text = f"rollout {job['done']} of {job['num_rollout'] or '?'}, {job['phase'] or 'between phases'}"
    if job["target"]:
        text += f" {job['finished']}/{job['target']}"
    if job["reward"] is not None:
        text += f", reward {job['reward']:.3f}"
    if job["step_s"] is not None:
        text += f", last step {job['step_s']:.1f} s"
    return Text(text)


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for node in nodes:
        info = node.get("inventory")
        heard = "-" if node["heard_s_ago"] is None else _ago(node["heard_s_ago"])
        rows.append((node["name"], node["state"], heard, *(_devices(info) if info else ("-", "-", "-")), _store(node)))
    return _table("nodes", ("node", "state", "heard", "host", "devices", "memory", "store"), rows)


def _store(node: Mapping[str, Any]) -> str:
    store = node.get("store")
    if not store:
        return "-"
    used, limit = (f"{store[name] / 2**30:.1f}" for name in ("used_bytes", "limit_bytes"))
    waiting = f", {store['waiting']} wait" if store["waiting"] else ""
    return f"{used} of {limit} GiB, {store['objects']} objects, {store['holders']} mapped{waiting}"


def _devices(info: Mapping[str, Any]) -> tuple[str, str, str]:
    gpus = info["gpus"]
    devices = f"{len(gpus)} x {gpus[0]['name']}" if gpus else f"{info['cpu_slots']} CPU slots"
    return info["hostname"], devices, f"{info['memory_bytes'] / 2**30:.0f} GiB"


def _zygotes(zygotes: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = [
        (node, z["name"], z["pid"] or "-", z["state"], z["made"], f"{z['memory_bytes'] / 2**20:.0f} MiB")
        for node, z in zygotes
    ]
    return _table("zygotes", ("node", "zygote", "pid", "state", "workers made", "memory"), rows)


def _mesh(mesh: Mapping[str, Any]) -> Table:
    title = f"mesh {mesh['name']} ({mesh['shape']})" + (f"  FAILED: {mesh['failed']}" if mesh["failed"] else "")
    rows = []
    for rank in mesh["ranks"]:
        owes = rank["owes"]
        at_work = f"{owes[0]['method']} for {_ago(owes[0]['age_s'])}" if owes else "idle"
        more = f" (+{rank['num_owed'] - 1})" if rank["num_owed"] > 1 else ""
        state = f"{rank['state']}: {rank['evidence']}" if rank["evidence"] else rank["state"]
        devices = ",".join(map(str, rank["devices"])) or "-"
        rows.append((rank["rank"], rank["node"], devices, rank["pid"], state, at_work + more))
    return _table(title, ("rank", "node", "devices", "pid", "state", "call"), rows)


def _services(services: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for service in services:
        ports = ", ".join(f"{name} {port}" for name, port in service["ports"].items())
        fault = service["fault"].partition("\n")[0]
        rows.append((service["name"], service["node"], service["phase"], service["pid"] or "-", ports, fault))
    return _table("services", ("service", "node", "phase", "pid", "ports", "fault"), rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text, not str: rich would read [brackets] as markup
    return table


def _ago(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
