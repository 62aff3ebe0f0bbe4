"""``miles status``: find the run in the user's runtime directory, ask its status server, print the answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from miles_agents.errors import ConfigError, PeerFault
from miles_agents.runtime_dir import live_runs
from miles_controller.status_server import STATUS_FILE

_DEADLINE_S = 10.0


class NoSuchRun(ConfigError):
    """There is no such run of this user on this machine, or more than one could be meant."""

    code = "E-CLI-004"


class NoStatus(PeerFault):
    """The run's controller does not answer its status page."""

    code = "E-CLI-005"


def print_status(run: str | None, *, as_json: bool) -> None:
    """Print the snapshot of ``run``, or of the only one there is.

    Raises:
        NoSuchRun: None, or several to choose from.
        NoStatus: It did not answer within 10 s.
    """
    snapshot = fetch(find_run(run))
    if as_json:
        sys.stdout.write(json.dumps(snapshot) + "\n")
    else:
        Console().print(render(snapshot))


def find_run(run: str | None) -> Path:
    """The status file of that run, or of the only one."""
    runs = {name: path / STATUS_FILE for name, path in live_runs().items() if (path / STATUS_FILE).exists()}
    if run is None and len(runs) == 1:
        return next(iter(runs.values()))
    if run is not None and run in runs:
        return runs[run]
    known = ", ".join(runs) or "none"
    if run is None and runs:
        raise NoSuchRun("several runs are alive", evidence=f"runs: {known}", advice="Choose one with --run.")
    raise NoSuchRun(
        "no run is alive here" if run is None else f"run {run} is not alive here",
        evidence=f"runs of this user on this machine: {known}",
        advice="Ask on the machine, and as the user, that runs the controller.",
    )


def fetch(file: Path) -> Any:
    """The snapshot, from the server that the status file names."""
    try:
        about = json.loads(file.read_text())
        request = Request(f"{about['url']}/status", headers={"Authorization": f"Bearer {about['token']}"})  # noqa: S310
        # Without a proxy, whatever the environment says: this is loopback, and the token is nobody else's.
        with build_opener(ProxyHandler({})).open(request, timeout=_DEADLINE_S) as answer:
            return json.load(answer)
    except (OSError, URLError, ValueError, KeyError) as error:
        raise NoStatus(
            f"run {file.parent.name} does not tell its status",
            evidence=f"{type(error).__name__}: {error}",
            advice="Look at the controller's log; if its process is stopped or stuck, end it.",
        ) from error


def render(value: Any) -> RenderableType:
    """Plain data as tables: an object as rows, a list of objects with a column for every key that occurs."""
    if isinstance(value, Mapping):
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for key, item in value.items():
            table.add_row(Text(str(key), style="bold"), render(item))
        return table
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        table = Table(box=None, padding=(0, 2, 0, 0))
        columns = list(dict.fromkeys(key for item in value for key in item))
        for key in columns:
            table.add_column(str(key))
        for item in value:
            table.add_row(*(render(item.get(key, "")) for key in columns))
        return table
    if isinstance(value, list):
        return Group(*map(render, value)) if value else Text("-")
    return Text("-" if value is None else str(value))  # Text, not str: rich would read [brackets] as markup
