"""A service: a child that is not ours inside, kept alive behind a health probe. The shell around ``service_life``.

* Consumes: a ``ServiceSpec``; what owners ask (``stop``, ``pause``, ``release``, ``resume``, ``fence``).
* Produces: one process at a time with its ports; a ``ServiceChange`` for each change of phase, with the fault and
  the log's last lines where it is a failure.
* Waits for: the next event or the life's next deadline (``wake_at``).
* Invariants: when ``run`` has ended, also by cancellation, the process and all that it started are gone and the ports
  are given back.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from miles_agents.agent import service_life as life
from miles_agents.agent.logs import RING_LINES, last_lines
from miles_agents.agent.process import Child, Command, KillReport
from miles_agents.agent.service_life import Phase
from miles_agents.errors import ConfigError, MilesError, PeerFault

_log = logging.getLogger(__name__)
_PLACEHOLDER = re.compile(r"\{(?:(port|host)|ports\[([^\]{}]*)\])\}")
_ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
_ALIVE = (Phase.STARTING, Phase.READY, Phase.PAUSED, Phase.RELEASED, Phase.RESUMING)
EVIDENCE_LINES = 20
_GPU_ROUNDS = 3
"""How often an ended service's GPU memory is waited for (by ``kill_tree``, with its own bound)."""


class ServiceDied(PeerFault):
    """The process of a service ended although nobody asked it to."""

    code = "E-SVC-001"


class ServiceNotReady(PeerFault):
    """A service runs but does not answer its health probe (any more, or yet)."""

    code = "E-SVC-002"


class BadServiceSpec(ConfigError):
    """A service is described in a way that cannot work."""

    code = "E-SVC-003"


class ProcessStarter(Protocol):
    """What starts and ends processes here: the agent's ``ProcessTable``."""

    async def spawn(self, command: Command) -> Child:
        """Start it, its output appended to the log. Raises ``MilesError``; leaves nothing if cancelled."""

    async def kill_tree(self, child: Child, *, grace_s: float) -> KillReport:
        """TERM, grace, KILL, for the child and all below it and left by it; returns what remains, in bounded time."""


class PortLessor(Protocol):
    """What leases ports here: the agent's ``PortLeases``."""

    def lease(self, owner: str, count: int) -> list[int]:
        """Ports that nobody else gets. Raises ``MilesError`` if there are not enough."""

    def hand_over(self, ports: Iterable[int]) -> None:
        """The process that will bind them is about to start."""

    def release(self, owner: str) -> None:
        """The owner needs its ports no more."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What to run and how to see that it is well.

    ``env`` is the complete environment, ``cwd`` by default the folder of the log. ``argv`` and the values of ``env``
    may hold ``{port}`` (the first of ``ports``), ``{ports[name]}`` and ``{host}``.
    Healthy means that GET ``health_path`` on ``health_port`` (a name; default: the first) answers with
    ``expected_status``.
    """

    name: str
    argv: tuple[str, ...]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    host: str = "127.0.0.1"
    ports: tuple[str, ...] = ("http",)
    health_port: str | None = None
    health_path: str = "/health"
    expected_status: int = 200
    numbers: life.LifeNumbers = field(default_factory=life.LifeNumbers)

    def __post_init__(self) -> None:
        used = {match[2] for text in (*self.argv, *self.env.values()) for match in _PLACEHOLDER.finditer(text)}
        unknown = (used | {self.health_port}) - {None, *self.ports}
        if unknown or not self.ports or not self.argv or not self.health_path.startswith("/"):
            raise BadServiceSpec(
                f"service {self.name!r} is described in a way that cannot work",
                evidence=f"argv={list(self.argv)} ports={list(self.ports)} health_path={self.health_path!r}; "
                f"unknown port names: {', '.join(sorted(map(str, unknown))) or 'none'}",
                advice="Name at least one port, use only named ports in {ports[...]}, begin health_path with '/'.",
            )

    def fill(self, text: str, ports: Mapping[str, int]) -> str:
        """Put ports and host in place of their placeholders; other braces stay as they are."""

        def value(match: re.Match[str]) -> str:
            if match[1] == "host":
                return self.host
            return str(ports[match[2] if match[1] is None else self.ports[0]])

        return _PLACEHOLDER.sub(value, text)


@dataclass(frozen=True, slots=True)
class ServiceChange:
    """One change of phase. ``fault`` is set where it is a failure, and then ``log_tail`` too (oldest line first)."""

    name: str
    attempt: int
    pid: int | None
    ports: Mapping[str, int]
    transition: life.Transition
    fault: ServiceDied | ServiceNotReady | None = None
    log_tail: tuple[str, ...] = ()


class Service:
    """Runs one service. One task runs ``run``; the other methods may be called at any time on its loop."""

    def __init__(
        self,
        spec: ServiceSpec,
        starter: ProcessStarter,
        lessor: PortLessor,
        on_change: Callable[[ServiceChange], None],
    ) -> None:
        self.spec = spec
        self.fault: ServiceDied | ServiceNotReady | None = None
        self._starter = starter
        self._lessor = lessor
        self._on_change = on_change
        self._state = life.Life(spec.numbers)
        self._events: asyncio.Queue[life.Event] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._ports: dict[str, int] = {}
        self._port_owner = ""
        self._child: Child | None = None
        self._probing: asyncio.Task[None] | None = None
        self._log_start = 0

    @property
    def state(self) -> life.Life:
        """The life as it stands; its ``story`` says how it came there."""
        return self._state

    @property
    def ports(self) -> Mapping[str, int]:
        """Port by name; empty before the first start and after the end."""
        return self._ports

    def stop(self, why: str = "asked to stop") -> None:
        """End it for good; ``run`` returns when it is gone."""
        self._events.put_nowait(life.StopAsked(why))

    def fence(self, why: str) -> None:
        """Kill it without grace and never start it again. ``run`` goes on until ``stop``."""
        self._events.put_nowait(life.FenceAsked(why))

    def pause(self) -> None:
        """Do not probe until ``resume``."""
        self._events.put_nowait(life.PauseAsked())

    def release(self, *, done: bool) -> None:
        """Its memory is being given back (``done`` False), or is given back (``done`` True)."""
        self._events.put_nowait(life.ReleaseDone() if done else life.ReleaseAsked())

    def resume(self) -> None:
        """Probe again."""
        self._events.put_nowait(life.ResumeAsked())

    async def wait_for(self, *phases: Phase, deadline: float) -> None:
        """Wait until it is in one of ``phases``.

        Raises:
            ServiceDied, ServiceNotReady: it is dead (and that was not asked for), with the fault that ended it.
            TimeoutError: ``deadline`` (loop time) came first.
        """
        async with asyncio.timeout_at(deadline):
            while self._state.phase not in phases:
                if self._state.phase is Phase.DEAD:
                    raise self.fault or ServiceDied(
                        f"service {self.spec.name!r} was ended",
                        evidence=str(self._state.story[-1]) if self._state.story else "it never started",
                        advice="Start it anew if it is still needed.",
                    )
                await self._changed.wait()

    async def run(self) -> None:
        """Keep it alive until it is dead: stopped, or given up (then ``fault`` says why)."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._state, effects = life.begin(self.spec.numbers, loop.time())
                self._carry_out(effects, tasks)
                while self._state.phase is not Phase.DEAD:
                    event = await self._next_event()
                    self._state, effects = life.step(self._state, event, loop.time())
                    self._carry_out(effects, tasks)
                self._cancel_probe()
        finally:
            if self._state.phase is not Phase.DEAD:
                await self._abandon()
            self._clean_up()

    async def _abandon(self) -> None:
        """``run`` is cancelled: nothing is left behind."""
        now, attempt = asyncio.get_running_loop().time(), self._state.attempt
        child, self._child = self._child, None
        if child is not None:
            await self._starter.kill_tree(child, grace_s=0.0)
        self._state, _ = life.step(self._state, life.StopAsked("whoever ran it was cancelled"), now)
        for gone in (life.StartFailed(attempt, "cancelled"), life.Exited(attempt, "killed")):
            self._state, _ = life.step(self._state, gone, now)

    def _clean_up(self) -> None:
        self._ports = {}
        if self._port_owner:
            self._lessor.release(self._port_owner)
        self._wake_waiters()

    async def _next_event(self) -> life.Event:
        try:
            async with asyncio.timeout_at(life.wake_at(self._state)):
                return await self._events.get()
        except TimeoutError:
            return life.Tick()

    def _carry_out(self, effects: list[life.Effect], tasks: asyncio.TaskGroup) -> None:
        for effect in effects:
            match effect:
                case life.Start(attempt, new_ports):
                    tasks.create_task(self._live(attempt, new_ports), name=f"{self.spec.name}#{attempt}")
                case life.Probe(attempt):
                    self._probing = tasks.create_task(self._probe(attempt), name=f"{self.spec.name} probe")
                case life.Kill(_, grace_s):
                    tasks.create_task(self._kill(grace_s), name=f"{self.spec.name} kill")
                case life.Report(transition):
                    self._report(transition)
                case life.GiveUp(reason):
                    _log.error("service %s is given up: %s", self.spec.name, reason)

    async def _live(self, attempt: int, new_ports: bool) -> None:
        """One life of the process, from lease to exit."""
        try:
            child = await self._start(attempt, new_ports)
        except (MilesError, OSError) as error:
            why = error.what if isinstance(error, MilesError) else str(error)
            self._events.put_nowait(life.StartFailed(attempt, why))
            return
        self._child = child
        self._events.put_nowait(life.Started(attempt, child.pid))
        exited = await asyncio.shield(child.exited)
        self._cancel_probe()
        # What it left behind may hold its ports and its GPU memory: it is not gone before that is.
        left = await self._end_what_is_left(child)
        self._child = None
        in_use = any(_ADDRESS_IN_USE.search(line) for line in self._log_tail(RING_LINES))
        self._events.put_nowait(life.Exited(attempt, exited.describe() + left, in_use))

    async def _end_what_is_left(self, child: Child) -> str:
        """Until nothing of it runs. Returns what is to be said of GPU memory that nobody can be killed for."""
        rounds = 0
        while True:
            report = await self._starter.kill_tree(child, grace_s=0.0)
            rounds += 1
            if report.clean:
                return ""
            _log.error("service %s has ended but leaves something: %s", self.spec.name, report.describe())
            if not report.survivors and rounds >= _GPU_ROUNDS:
                return f"; {sum(report.gpu_bytes.values()) >> 20} MiB of GPU memory were not given back"
            if report.survivors:
                await asyncio.sleep(self.spec.numbers.kill_again_s)

    async def _start(self, attempt: int, new_ports: bool) -> Child:
        spec = self.spec
        if new_ports or not self._ports:
            self._lease_ports(f"{spec.name}#{attempt}")
        argv = tuple(spec.fill(text, self._ports) for text in spec.argv)
        env = {key: spec.fill(text, self._ports) for key, text in spec.env.items()}
        self._log_start = spec.log_path.stat().st_size if spec.log_path.exists() else 0
        self._lessor.hand_over(self._ports.values())
        return await self._starter.spawn(Command(argv, env, spec.cwd or spec.log_path.parent, spec.log_path))

    def _lease_ports(self, owner: str) -> None:
        names = self.spec.ports
        ports = self._lessor.lease(owner, len(names))
        if self._port_owner:  # only now: so the new ports are others
            self._lessor.release(self._port_owner)
        self._port_owner = owner
        self._ports = dict(zip(names, ports, strict=True))

    async def _kill(self, grace_s: float) -> None:
        """The life asks again if this was in vain; success shows as the exit."""
        if self._child is not None:
            await self._starter.kill_tree(self._child, grace_s=grace_s)

    def _cancel_probe(self) -> None:
        if self._probing is not None:
            self._probing.cancel()

    async def _probe(self, attempt: int) -> None:
        spec = self.spec
        port = self.ports[spec.health_port or spec.ports[0]]
        from miles_agents.agent.http_probe import get_status  # an agent without services needs no HTTP

        found = await get_status(spec.host, port, spec.health_path, timeout_s=spec.numbers.probe_timeout_s)
        if found == spec.expected_status:
            self._events.put_nowait(life.ProbeOk(attempt))
            return
        why = found if isinstance(found, str) else f"status {found} instead of {spec.expected_status}"
        self._events.put_nowait(life.ProbeFailed(attempt, why))

    def _report(self, transition: life.Transition) -> None:
        state = self._state
        fault = self._fault_of(transition)
        tail = tuple(self._log_tail(EVIDENCE_LINES)) if fault is not None else ()
        if fault is not None:
            self.fault = fault
        self._on_change(
            ServiceChange(self.spec.name, state.attempt, state.pid, dict(self.ports), transition, fault, tail)
        )
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fault_of(self, transition: life.Transition) -> ServiceDied | ServiceNotReady | None:
        before, after = transition.before, transition.after
        if after is Phase.UNHEALTHY:
            return self._describe(ServiceNotReady, "does not answer", transition.cause)
        if after is Phase.DEAD and before is Phase.UNHEALTHY:
            return self._describe(ServiceNotReady, "did not answer and is given up", transition.cause)
        died = before in _ALIVE and after in (Phase.BACKOFF, Phase.DEAD)
        when = " before it was ready" if before is Phase.STARTING else ""
        return self._describe(ServiceDied, f"died{when}", transition.cause) if died else None

    def _describe(
        self, kind: type[ServiceDied | ServiceNotReady], what: str, cause: str
    ) -> ServiceDied | ServiceNotReady:
        spec = self.spec
        lines = self._log_tail(EVIDENCE_LINES)
        health = f"GET http://{spec.host}:{self.ports.get(spec.health_port or spec.ports[0])}{spec.health_path}"
        shown = "\n".join(lines) if lines else "(it wrote nothing)"
        return kind(
            f"service {spec.name!r} {what}: {cause}",
            evidence=f"attempt {self._state.attempt}, {health}; last lines of {spec.log_path}:\n{shown}",
            advice=f"Read {spec.log_path}; the first error in it is usually the cause.",
            service=spec.name,
            attempt=self._state.attempt,
            log_path=str(spec.log_path),
        )

    def _log_tail(self, count: int) -> list[str]:
        return last_lines(self.spec.log_path, count, start=self._log_start)
