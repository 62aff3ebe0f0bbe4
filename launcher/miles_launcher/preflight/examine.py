"""Ask all hosts, in rounds: facts, clocks, shared paths, who reaches whom.

Consumes: channels. Produces: ``Examined``. Waits for: answers, each with a deadline; a host that misses one is asked no
more. Invariants: at most ``AT_ONCE`` hosts are asked at a time; files that were written to see who shares a directory
are removed; a host that does not answer hinders nobody else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles_launcher.preflight import gpus
from miles_launcher.preflight.channel import Answer, Channel, NoAnswer
from miles_launcher.preflight.facts import Examined, HostFacts, HostReport, Link
from miles_launcher.preflight.needs import ASKED, Needs
from miles_launcher.preflight.network import addresses

AT_ONCE = 64
FIRST_ANSWER_S = 30.0
"""With logging in, and starting Python from a cold shared disk."""
ANSWER_S = 20.0
CONNECT_S = 4.0
_CLOCK_ROUNDS = 3
ALL_PAIRS_UP_TO = 24
"""Hosts among which every pair is tried; beyond it, neighbours at distances 1, 2, 4, ... and the first host."""

CONTROLLER = "controller"


@dataclass(frozen=True)
class Hub:
    """A listener that tells this token to whoever connects."""

    address: str
    port: int
    token: str


async def examine(
    channels: Sequence[Channel],
    needs: Needs,
    *,
    towards: str = "",
    hub: Hub | None = None,
    path: Sequence[str] = (),
    quick: bool = False,
) -> Examined:
    """All rounds; closes the channels.

    Args:
        channels: One per host, with different names.
        needs: Which paths, packages and ports to look at.
        towards: Address of the controller: agents take their own on the way to it.
        hub: A listener at that address, which everybody has to reach.
        path: Where hosts that share a file system with this machine find our code.
        quick: Leave out code and versions of packages, which a host alone is not compared by.
    """
    packages = () if quick else dict.fromkeys((*ASKED, *needs.packages))
    asked = {"packages": list(packages), "code": not quick, "peer": towards, "path": list(path)}
    work = _Examination(channels, needs, asked)
    try:
        await work.facts()
        if len(work.alive) > 1:
            await work.clocks()
            await work.shared()
        if len(work.alive) > 1 or hub is not None:
            await work.links(hub)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    return work.found()


class _Examination:
    def __init__(self, channels: Sequence[Channel], needs: Needs, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self._channels = {channel.name: channel for channel in channels}
        self._needs = needs
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._reports = {name: HostReport(name) for name in self._channels}
        self._unshared: dict[str, dict[str, str]] = {}
        self._links: list[Link] = []

    @property
    def alive(self) -> dict[str, HostFacts]:
        """Those that have answered so far."""
        return {name: report.facts for name, report in self._reports.items() if report.facts is not None}

    def found(self) -> Examined:
        return Examined(tuple(self._reports.values()), self._unshared, tuple(self._links))

    async def _ask(self, name: str, do: str, timeout_s: float = ANSWER_S, **details: Any) -> Answer | None:
        """None: no answer; then the host counts as one that does not."""
        async with self._slots:
            try:
                return await self._channels[name].ask(do, timeout_s, **details)
            except NoAnswer as error:
                self._reports[name] = HostReport(name, error=error.evidence)
                return None

    async def _of_all(self, work: Callable[[str], Awaitable[None]], names: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(_run(work, name))

    async def facts(self) -> None:
        needs = self._needs
        paths = {**needs.paths, "tmp": "/tmp", "shm": "/dev/shm"}  # noqa: S108 - looked at, nothing is written
        first = next(iter(self._channels))

        async def ask(name: str) -> None:
            answer = await self._ask(
                name, "facts", FIRST_ANSWER_S, **self._asked, paths=paths, gpus=needs.device != "cpu",
                ports=list(needs.ports) if name == first else [],
            )  # fmt: skip
            if answer is not None and "error" in answer:
                self._reports[name] = HostReport(name, error=str(answer["error"]))
            elif answer is not None:
                self._reports[name] = HostReport(name, facts=_typed(answer))

        await self._of_all(ask, list(self._channels))

    async def clocks(self) -> None:
        """The offset from the round that took least; its error is half the way there and back."""

        async def ask(name: str) -> None:
            best: tuple[float, float] | None = None
            for _ in range(_CLOCK_ROUNDS):
                begin, at = time.monotonic(), time.time()
                answer = await self._ask(name, "clock")
                took = time.monotonic() - begin
                if answer is None or "now" not in answer:
                    return
                if best is None or took < best[0]:
                    best = took, float(answer["now"]) - (at + took / 2)
            if best is not None:
                self._reports[name] = replace(self._reports[name], clock_s=best[1], clock_error_s=best[0] / 2)

        await self._of_all(ask, list(self.alive))

    async def shared(self) -> None:
        """The first host writes a file that the others must see."""
        writer, *readers = self.alive
        for label in dict.fromkeys((*self._needs.shared, *self._needs.written)):
            about = self.alive[writer].get("paths", {}).get(label) if writer in self.alive else None
            if about is None:
                continue
            token = secrets.token_hex(8)
            path = str(Path(about["nearest"]) / f".miles-doctor-{token}")
            answer = await self._ask(writer, "write", path=path, text=token)
            if answer is None or "error" in answer:
                continue  # that it cannot be written to is said by the judge of the host
            missing: dict[str, str] = {}

            async def read(name: str, path: str = path, token: str = token, missing: dict[str, str] = missing) -> None:
                seen = await self._ask(name, "read", path=path)
                if seen is not None and seen.get("text") != token:
                    missing[name] = f"does not see what {writer} wrote there ({seen.get('error', 'other text')})"

            try:
                await self._of_all(read, [name for name in readers if name in self.alive])
            finally:
                await self._ask(writer, "remove", path=path)
            if missing:
                self._unshared[label] = missing

    async def links(self, hub: Hub | None) -> None:
        """Every address that somebody would use, from everybody who would use it."""
        targets: dict[str, list[tuple[str, str, int, str]]] = {}

        async def listen(name: str) -> None:
            cuda = self._needs.device != "cpu" and bool(gpus.count(self.alive[name]))
            own = addresses(self.alive[name], self._needs.env, self._needs.interface, cuda=cuda)
            for address in dict.fromkeys(own.values()):
                purpose = " and ".join(purpose for purpose, each in own.items() if each == address)
                token = secrets.token_hex(8)
                answer = await self._ask(name, "listen", address=address, token=token)
                if answer is not None and "port" in answer:
                    targets.setdefault(name, []).append((purpose, address, int(answer["port"]), token))

        await self._of_all(listen, list(self.alive))
        wanted = _pairs(list(self.alive))

        async def connect(name: str) -> None:
            peers: list[dict[str, Any]] = [
                {"name": f"{target} {purpose}", "address": address, "port": port, "token": token}
                for target in wanted[name]
                for purpose, address, port, token in targets.get(target, ())
            ]
            if hub is not None:
                peers.append({"name": CONTROLLER, "address": hub.address, "port": hub.port, "token": hub.token})
            answer = await self._ask(name, "connect", peers=peers, each_s=CONNECT_S) if peers else None
            if answer is not None:
                self._note(name, peers, answer.get("peers", {}))

        await self._of_all(connect, list(self.alive))

    def _note(self, source: str, peers: list[dict[str, Any]], problems: Mapping[str, str]) -> None:
        for peer in peers:
            target, _, purpose = peer["name"].partition(" ")
            problem = str(problems.get(peer["name"], "not tried"))
            self._links.append(Link(source, target, purpose or "agents", peer["address"], problem))


def _typed(answer: Answer) -> HostFacts:
    facts: HostFacts = dict(answer)  # type: ignore[assignment]  # the probe's own shape; the judge survives another one
    return facts


async def _run(work: Callable[[str], Awaitable[None]], name: str) -> None:
    await work(name)


def _pairs(names: Sequence[str]) -> dict[str, list[str]]:
    """By host, those that it tries to reach. All, or enough that every ring and tree over the hosts is like them."""
    return {name: list(_peers(names, place)) for place, name in enumerate(names)}


def _peers(names: Sequence[str], place: int) -> Iterator[str]:
    size = len(names)
    if size <= ALL_PAIRS_UP_TO:
        yield from (name for other, name in enumerate(names) if other != place)
        return
    steps = {1 << power for power in range(size.bit_length()) if 1 << power < size}
    wanted = {(place + step) % size for step in steps} | {0}
    yield from (names[other] for other in sorted(wanted - {place}))
