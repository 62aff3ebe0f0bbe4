"""The runs of this user on this machine, and how to ask and order them.

A run is found through the user's runtime directory: a directory that some process holds, with a file that its status
server wrote. So nothing is looked for by the name of a process, and runs of others are not seen.
"""

from __future__ import annotations

import json
import os
import pwd
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from miles_agents.errors import ConfigError, MilesError, PeerFault
from miles_agents.runtime_dir import live_runs
from miles_controller.status_server import STATUS_FILE

_DEADLINE_S = 10.0
_ORDER_DEADLINE_S = 30.0


class NoSuchRun(ConfigError):
    """There is no such run of this user on this machine, or more than one could be meant."""

    code = "E-CLI-004"


class NoStatus(PeerFault):
    """The run's controller does not answer its status page."""

    code = "E-CLI-005"


class OrderRefused(ConfigError):
    """The controller of the run did not carry an order out; the message is its own."""

    code = "E-CLI-006"


@dataclass(frozen=True)
class Run:
    """One run that is alive.

    Attributes:
        run_id: Its id.
        directory: Its runtime directory.
        pid: Of the process that has its controller; 0: not known.
        run_dir: Where its logs are; None: it writes none.
        began: Seconds since the epoch; 0: not known.
    """

    run_id: str
    directory: Path
    pid: int
    run_dir: Path | None
    began: float

    @property
    def is_alive(self) -> bool:
        """Whether some process of it still runs."""
        return self.run_id in live_runs()

    def line(self) -> str:
        """For a list of runs."""
        since = f", for {max(0.0, time.time() - self.began) / 60:.0f} min" if self.began else ""
        where = f", directory {self.run_dir}" if self.run_dir else ""
        return f"{self.run_id}: pid {self.pid}{since}{where}"


def all_runs() -> list[Run]:
    """Every run of this user that has a status file, newest last."""
    found = []
    for run_id, directory in live_runs().items():
        if not (directory / STATUS_FILE).exists():
            continue
        about: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):  # it is ending; whoever asks it is told
            about = dict(json.loads((directory / STATUS_FILE).read_text()))
        run_dir = about.get("run_dir")
        where = Path(run_dir) if run_dir else None
        found.append(Run(run_id, directory, about.get("pid", 0), where, about.get("began", 0.0)))
    return found


def find_run(name: str | None) -> Run:
    """The run of that id, or with that run directory; None: the only one there is. Raises NoSuchRun."""
    runs = all_runs()
    if name is None and len(runs) == 1:
        return runs[0]
    if name is not None:
        path = Path(name).absolute()
        found = [run for run in runs if run.run_id == name] or [run for run in runs if run.run_dir == path.resolve()]
        if len(found) == 1:
            return found[0]
    known = "\n".join(run.line() for run in runs) or "none"
    if name is None and runs:
        raise NoSuchRun("several runs are alive", evidence=known, advice="Choose one with --run RUN_ID.")
    others = _others()
    also = f"\nother users have runtime directories here: {others}" if others else ""
    raise NoSuchRun(
        "no run is alive here" if name is None else f"run {name} is not alive here",
        evidence=f"runs of user {_user(os.geteuid())} on this machine: {known}{also}",
        advice="Ask on the machine, and as the user, that runs the controller.",
    )


def ask(run: Run, path: str) -> Any:
    """What a page of the run's status server says. Raises NoStatus."""
    return _answer(run, path, method="GET", deadline_s=_DEADLINE_S)


def order(run: Run, path: str, query: Mapping[str, str]) -> Any:
    """Have an order carried out. Raises NoStatus, and OrderRefused with the controller's own words."""
    return _answer(run, f"{path}?{urlencode(query)}", method="POST", deadline_s=_ORDER_DEADLINE_S)


def _answer(run: Run, path: str, *, method: str, deadline_s: float) -> Any:
    try:
        about = json.loads((run.directory / STATUS_FILE).read_text())
        headers = {"Authorization": f"Bearer {about['token']}"}
        request = Request(f"{about['url']}{path}", headers=headers, method=method)  # noqa: S310
        # Without a proxy, whatever the environment says: this is loopback, and the token is nobody else's.
        with build_opener(ProxyHandler({})).open(request, timeout=deadline_s) as answer:
            return json.load(answer)
    except HTTPError as error:
        with error:
            raise _refusal(run, error) from None
    except (OSError, URLError, ValueError, KeyError) as error:
        raise NoStatus(
            f"run {run.run_id} does not tell its status",
            evidence=f"{type(error).__name__}: {error}",
            advice="Look at the controller's log; if its process is stopped or stuck, end it.",
        ) from error


def _refusal(run: Run, error: HTTPError) -> MilesError:
    try:
        told = json.load(error)
        return OrderRefused(told["what"], evidence=told["evidence"], advice=told["advice"], told=told["code"])
    except (ValueError, KeyError, TypeError, OSError):
        return NoStatus(
            f"the controller of run {run.run_id} does not know the order",
            evidence=f"HTTP {error.code}",
            advice="Use the `miles` of the environment that the run was started from.",
        )


def _others() -> str:
    """Other users that have had runs here, by name; what they run is nobody else's to see."""
    uids = []
    for path in Path("/tmp").glob("miles-*"):  # noqa: S108
        uid = path.name.removeprefix("miles-")
        if uid.isdigit() and int(uid) != os.geteuid():
            uids.append(int(uid))
    return ", ".join(_user(uid) for uid in sorted(uids))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
