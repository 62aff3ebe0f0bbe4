"""Inventories, requests and placements as plain text tables, for errors and dry runs."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from miles_controller.placement import Inventory, NodeDevices, Placement, Request

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH = 100


def render_inventory(inventory: Inventory, spares: Collection[str] = (), *, width: int = TABLE_WIDTH) -> str:
    """What there is: node, devices, how many are free, used by whom, failed."""
    rows = [
        (
            node.name,
            f"{len(node.info.devices)} {node.info.device_kind}",
            str(len(node.free)) + (" (spare)" if node.name in spares else ""),
            _users(node),
            ranges(node.failed) or "-",
        )
        for node in inventory.nodes
    ]
    return _render("there is", ("node", "devices", "free", "used by", "failed"), rows, width)


def render_requests(requests: Sequence[Request], *, width: int = TABLE_WIDTH) -> str:
    """What was asked: ranks, devices, conditions."""
    rows = [
        (
            request.name,
            request.kind,
            str(request.num_ranks),
            str(request.devices_per_rank),
            str(request.num_ranks * request.devices_per_rank),
            _conditions(request) or "-",
        )
        for request in requests
    ]
    return _render("asked", ("request", "kind", "ranks", "devices per rank", "devices", "conditions"), rows, width)


def render_placement(placement: Placement, *, width: int = TABLE_WIDTH) -> str:
    """Who runs where: one line for each request and node, spares last."""
    grouped: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for name, rank, slot in placement.items():
        ranks, devices = grouped.setdefault((slot.node, name), ([], []))
        ranks.append(rank)
        devices += slot.devices
    order = {node: index for index, node in enumerate(placement.nodes)}
    rows = [
        (
            node + (" (head)" if node == placement.head else ""),
            name + (" (shared)" if name in placement.shared else ""),
            ranges(ranks),
            ranges(devices) or "-",
        )
        for (node, name), (ranks, devices) in sorted(grouped.items(), key=lambda item: order[item[0][0]])
    ]
    rows += [(f"{node} (spare)", "-", "-", "-") for node in placement.spares]
    return _render("placement", ("node", "request", "ranks", "devices"), rows, width)


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,5``: distinct numbers, ascending; empty for none."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _users(node: NodeDevices) -> str:
    by_user: dict[str, list[int]] = {}
    for device, who in sorted(node.used.items()):
        by_user.setdefault(who, []).append(device)
    return "; ".join(f"{who}: {ranges(devices)}" for who, devices in by_user.items()) or "-"


def _conditions(request: Request) -> str:
    found = [
        (request.colocate_with is not None, f"shares with {request.colocate_with}"),
        (request.max_ranks_per_node is not None, f"at most {request.max_ranks_per_node} ranks on a node"),
        (request.ranks_per_node is not None, f"exactly {request.ranks_per_node} ranks on each node"),
        (request.nodes is not None, f"only on {', '.join(request.nodes or ())}"),
        (request.device_kind is not None, f"{request.device_kind} only"),
        (request.oversubscribe, "may share devices"),
    ]
    return "; ".join(text for holds, text in found if holds)


def _render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> str:
    # Imported here: only errors and dry runs draw tables.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(title=title, title_justify="left", box=box.ASCII2)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A fixed width and no colour whatever the terminal: the text goes into messages and logs.
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
