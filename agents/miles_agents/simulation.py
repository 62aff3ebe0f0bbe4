"""Nodes without machines: agents and workers as objects on one event loop, for tests and for large simulations.

``InProcessStarter`` is the twin of the process table: its workers are real ``WorkerRuntime``s on memory transports,
with numbers for pids, and they can be killed, frozen and kept from starting. ``SimulatedNode`` is the twin of the agent
process: it makes an ``Agent`` per life and can lose it as SIGKILL would. Consumes: births, orders to misbehave.
Produces: the same calls, beats, exits and silences as processes do. Waits for: nothing but timers, so on
``virtual_time`` it costs no time.

Invariants: a worker that has ended executes nothing more and says nothing more; a frozen one executes and says nothing
until it thaws, and its clock stands still; a frozen agent learns of no exit and kills nobody until it thaws. What the
twin cannot do: an async endpoint of a frozen worker runs on until its next message (which stays inside).
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from miles_agents.agent.agent import Agent, AgentParts
from miles_agents.agent.lease import Fence
from miles_agents.agent.logs import OpenTail
from miles_agents.agent.process_exit import Exit
from miles_agents.agent.process_launch import CannotStart
from miles_agents.agent.starter import Killed
from miles_agents.errors import MilesError
from miles_agents.node_info import NodeInfo
from miles_agents.rpc.errors import WorkerDied
from miles_agents.rpc.host import Executors
from miles_agents.simulated_logs import SilentTail
from miles_agents.timings import Timings
from miles_agents.wire.memory_transport import MemoryNetwork
from miles_agents.worker.main import exit_code_for
from miles_agents.worker.runtime import WorkerRuntime
from miles_agents.worker.spec import Birth, WorkerSpec

_FIRST_PID = 1000
_KILL_S = 10.0
_NO_FILES = Path("/nonexistent/simulated-logs")


class Fate(Enum):
    """What becomes of a worker that is started."""

    LIVES = "lives"
    CANNOT_START = "cannot start"
    DIES_BEFORE_HELLO = "dies before hello"
    NEVER_GREETS = "never greets"


class _FreezableExecutors:
    """The loop as main thread and async thread; jobs of a frozen process wait, those of a dead one are forgotten."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: deque[Callable[[], None]] | None = None
        self._dead = False

    def submit_main(self, job: Callable[[], None]) -> None:
        """Run on the loop, after everything submitted before."""
        self._loop.call_soon(self._run, job)

    def async_loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        return self._loop

    def freeze(self) -> None:
        """Run nothing until ``thaw``."""
        if self._held is None:
            self._held = deque()

    def thaw(self) -> None:
        """Run what waits, in order."""
        held, self._held = self._held, None
        for job in held or ():
            self.submit_main(job)

    def stop(self) -> None:
        """Run nothing ever again."""
        self._dead = True

    def _run(self, job: Callable[[], None]) -> None:
        if self._dead:
            return
        if self._held is not None:
            self._held.append(job)
        else:
            job()


class _FreezableRuntime(WorkerRuntime):
    """A runtime whose clock can stand still."""

    def __init__(self, birth: Birth, executors: Executors, leave: Callable[[str], None]) -> None:
        super().__init__(birth, executors, leave)
        self._frozen = False
        self._missed_tick = False

    def freeze(self) -> None:
        """Neither beat nor judge the lease until ``thaw``."""
        self._frozen = True

    def thaw(self) -> None:
        """Go on, and do now what fell due meanwhile."""
        self._frozen = False
        if self._missed_tick:
            self._missed_tick = False
            self._tick()

    def _tick(self) -> None:
        if self._frozen:
            self._missed_tick = True
        else:
            super()._tick()


class SimulatedWorker:
    """One worker of an ``InProcessStarter``; what an agent sees of it is ``starter.WorkerProcess``.

    Attributes:
        host: Its host on the memory network, for faults between it and its agent.
        gone_at: Loop time of its end, None while it lives.
        stubborn: It does not end on TERM.
        unkillable: It does not end on KILL either (state D).
        sweep_s: How long what it left behind takes to end.
    """

    def __init__(self, starter: InProcessStarter, pid: int, birth: Birth) -> None:
        self.pid = pid
        self.birth = birth
        self.host = f"{birth.node}/worker-{pid}"
        self.gone_at: float | None = None
        self.stubborn = False
        self.unkillable = False
        self.sweep_s = 0.0
        self.runtime: WorkerRuntime | None = None
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = self._loop.create_future()
        self._starter = starter
        self._frozen = False
        self._executors = _FreezableExecutors(self._loop)

    def __repr__(self) -> str:
        return f"<SimulatedWorker {self.spec.label} incarnation {self.spec.incarnation} {self.state() or 'gone'}>"

    @property
    def spec(self) -> WorkerSpec:
        """What it was started for."""
        return self.birth.spec

    def state(self) -> str | None:
        """The letter of /proc/pid/stat; None when gone."""
        if self.gone_at is not None:
            return None
        return "T" if self._frozen else "S"

    def print_stacks(self) -> None:
        """There is no process of its own whose stacks could be printed."""

    async def kill(self, grace_s: float) -> Killed:
        """TERM ends it at once, or, if it is frozen or stubborn, KILL after the grace. Waits while the agent is
        frozen."""
        await self._starter.agent_runs.wait()
        if self.gone_at is not None:
            return Killed("it was gone already")
        if grace_s > 0 and (self._frozen or self.stubborn):
            await asyncio.sleep(grace_s)
            grace_s = 0.0
        if self.unkillable:
            await asyncio.sleep(_KILL_S)
            return Killed("not ended", (f"pid {self.pid} state D",))
        number = signal.SIGTERM if grace_s > 0 else signal.SIGKILL
        self.end(Exit(code=None, signal=number))
        return Killed(f"ended by {number.name}")

    async def sweep(self) -> Killed:
        """It leaves nothing behind, but takes ``sweep_s``."""
        await asyncio.sleep(self.sweep_s)
        return Killed("nothing was left")

    # -- what befalls it -----------------------------------------------------------------------------------------

    def live(self, network: MemoryNetwork) -> None:
        """Execute: dial the agent and begin to beat."""
        runtime = _FreezableRuntime(self.birth, self._executors, self._leave)
        self.runtime = runtime
        runtime.start(lambda link: network.dialer(self.birth.agent_address, link, host=self.host))

    def kill_9(self) -> None:
        """As ``kill -9`` by somebody else."""
        self.end(Exit(code=None, signal=signal.SIGKILL))

    def exit(self, code: int) -> None:
        """As if its program called ``os._exit``."""
        self.end(Exit(code=code, signal=None))

    def freeze(self) -> None:
        """As SIGSTOP would."""
        if self.gone_at is None and not self._frozen:
            self._frozen = True
            self._starter.network.freeze(self.host)
            self._executors.freeze()
            if isinstance(self.runtime, _FreezableRuntime):
                self.runtime.freeze()

    def thaw(self) -> None:
        """As SIGCONT would."""
        if self.gone_at is None and self._frozen:
            self._frozen = False
            self._executors.thaw()
            self._starter.network.thaw(self.host)
            if isinstance(self.runtime, _FreezableRuntime):
                self.runtime.thaw()

    def end(self, how: Exit) -> None:
        """The process is over, without a goodbye. Idempotent."""
        if self.gone_at is not None:
            return
        self.gone_at = self._loop.time()
        self._executors.stop()
        if self.runtime is not None:
            # A frozen host is not thawed: what the process had not sent is lost with it.
            self.runtime.close()
            self.runtime.host.close()
            self.runtime.node.close(_died(self, how))
        self._starter.note_end(self, how)

    def _leave(self, reason: str) -> None:
        self.exit(exit_code_for(reason))


class InProcessStarter:
    """Starts workers as objects. It outlives the lives of its node's agent, as a process table does.

    Args:
        network: Where they dial.
        start_s: Seconds from birth to HELLO.
        fate: Judges each worker that is to be started; default: all live.
    """

    def __init__(
        self, network: MemoryNetwork, *, start_s: float = 0.01, fate: Callable[[WorkerSpec], Fate] | None = None
    ) -> None:
        self.network = network
        self.fate = fate
        self.start_s = start_s
        self.started: list[SimulatedWorker] = []
        self.agent_runs = asyncio.Event()
        self.agent_runs.set()
        self._loop = asyncio.get_running_loop()
        self._pids = itertools.count(_FIRST_PID)
        self._living: dict[int, SimulatedWorker] = {}
        self._untold: list[tuple[SimulatedWorker, Exit]] = []

    @property
    def living(self) -> list[SimulatedWorker]:
        """Workers that have not ended, oldest first."""
        return list(self._living.values())

    async def start(self, birth: Birth, log_path: Path) -> SimulatedWorker:
        """See ``WorkerStarter``. The worker executes after ``start_s``.

        Raises:
            CannotStart: so it was fated.
        """
        fate = self.fate(birth.spec) if self.fate is not None else Fate.LIVES
        await asyncio.sleep(self.start_s)
        if fate is Fate.CANNOT_START:
            raise CannotStart(
                f"{birth.spec.label} cannot be started",
                evidence="the simulation wants it so",
                advice="Nothing; this is a simulation.",
            )
        # Through the wire form, as a process would be told.
        worker = SimulatedWorker(self, next(self._pids), Birth.unpack(birth.pack()))
        self._living[worker.pid] = worker
        self.started.append(worker)
        if fate is Fate.LIVES:
            worker.live(self.network)
        elif fate is Fate.DIES_BEFORE_HELLO:
            self._loop.call_later(self.start_s, worker.exit, 1)
        return worker

    def kill_all(self) -> None:
        """Everything ends at once."""
        for worker in self.living:
            worker.kill_9()

    def freeze_agent(self) -> None:
        """The agent hears of no exit and kills nobody until ``thaw_agent``."""
        self.agent_runs.clear()

    def thaw_agent(self) -> None:
        """The agent goes on."""
        self.agent_runs.set()
        untold, self._untold = self._untold, []
        for worker, how in untold:
            worker.exited.set_result(how)

    def note_end(self, worker: SimulatedWorker, how: Exit) -> None:
        """For the worker: it is over."""
        del self._living[worker.pid]
        if self.agent_runs.is_set():
            worker.exited.set_result(how)
        else:
            self._untold.append((worker, how))


@dataclass(slots=True)
class Life:
    """One life of a simulated agent. ``over`` is the fence that ended it, or the error, or None if it was lost."""

    agent: Agent
    began_at: float
    ended_at: float | None = None
    over: Fence | MilesError | None = None


class SimulatedNode:
    """A machine with an agent that joins again after a fence, as the agent process does.

    Args:
        user_id: The public key with which it dials.
        process: Tells apart several agents that claim to be the same node.
        open_tail: What its workers print; None: nothing, and the controller is sent no lines.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        info: NodeInfo,
        *,
        controller: str,
        user_id: str,
        timings: Timings,
        process: str = "",
        join_timeout_s: float = 60.0,
        open_tail: OpenTail | None = None,
    ) -> None:
        self._open_tail = open_tail
        self.info = info
        self.host = info.node + process
        self.starter = InProcessStarter(network)
        self.lives: list[Life] = []
        self._network = network
        self._controller = controller
        self._user_id = user_id
        self._timings = timings
        self._join_timeout_s = join_timeout_s
        self._loop = asyncio.get_running_loop()
        self._fenced: list[int] = []
        self.reaper = 0
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<SimulatedNode {self.host} life {len(self.lives)}>"

    @property
    def agent(self) -> Agent:
        """The agent of the newest life."""
        return self.lives[-1].agent

    @property
    def is_running(self) -> bool:
        """Whether there is an agent process."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start the agent process (anew: it knows nothing of the one before)."""
        self._fenced = []
        self.reaper += 1
        self._task = self._loop.create_task(self._live_on(), name=f"agent of {self.host}")

    async def wait_ended(self, timeout_s: float | None = None) -> None:
        """Until the agent process has ended by itself, or so many seconds have passed."""
        assert self._task is not None
        await asyncio.wait([self._task], timeout=timeout_s)

    async def crash(self) -> None:
        """SIGKILL for the agent; its reaper kills what is left. No goodbye, no last words."""
        if not self.is_running:
            return
        agent = self.agent
        agent.link.close()
        if agent.workers is not None:
            agent.workers.link.close()
        self.thaw()
        self.starter.kill_all()
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    def freeze(self) -> None:
        """SIGSTOP for the agent alone; its workers run on."""
        self._network.freeze(self.host)
        self.starter.freeze_agent()

    def thaw(self) -> None:
        """SIGCONT for the agent."""
        self.starter.thaw_agent()
        self._network.thaw(self.host)

    async def _live_on(self) -> None:
        while True:
            life = Life(Agent(self._parts(), self._timings), self._loop.time())
            self.lives.append(life)
            try:
                life.over = await life.agent.run()
            except MilesError as error:
                life.over = error
                return
            finally:
                life.ended_at = self._loop.time()
                self.starter.kill_all()
            self._fenced.append(life.agent.session_id)
            if life.over.orderly:
                return

    def _parts(self) -> AgentParts:
        address = f"ipc:{self.host}/{len(self.lives)}"
        return AgentParts(
            info=self.info,
            dial=lambda link: self._network.dialer(self._controller, link, host=self.host, user_id=self._user_id),
            accept=lambda link: self._network.acceptor(address, link, host=self.host),
            starter=self.starter,
            log_dir=_NO_FILES,
            fenced=tuple(self._fenced),
            reaper=self.reaper,
            join_timeout_s=self._join_timeout_s,
            forward_logs=self._open_tail is not None,
            open_tail=self._open_tail or SilentTail,
        )


def simulated_info(node: str, *, cpu_slots: int = 8) -> NodeInfo:
    """A node without GPUs that offers this many CPU slots."""
    return NodeInfo(
        node=node,
        hostname=node,
        addresses=("127.0.0.1",),
        gpus=(),
        cpu_slots=cpu_slots,
        cores=cpu_slots,
        memory_bytes=1 << 30,
        python="3.11.0",
        platform="simulation",
    )


def _died(worker: SimulatedWorker, how: Exit) -> WorkerDied:
    return WorkerDied(
        f"{worker.spec.label} is over",
        evidence=how.describe(),
        advice="Nothing; nobody is left to see this.",
        may_have_run=True,
    )
