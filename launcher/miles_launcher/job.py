"""A training job inside another program: started, watched, asked and ended from its event loop (docs/embedding.md).

Consumes: a resolved config, a provider of nodes, orders. Produces: events, status, what the run directory has; a result
or the error that ended it. Waits for: nodes as long as their provider takes; for everything else with deadlines.
Invariants: nothing of the process is changed (signals, logging, environment, event loop policy, terminal), so that jobs
do not disturb each other or their program; when ``Ended`` is told, nothing of the job runs any more.
"""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import os
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from miles.flags.problems import FlagProblems, PassthroughUnreadable, Problem, ResolverFailed, UserArgumentsFailed
from miles.tracking.metrics_file import read_metrics
from miles.tracking.secrets import for_people
from miles.training.errors import first_of
from miles.training.job import JOIN_S, LOOPBACK, Nodes, run_job
from miles.training.loop import Outcome
from miles.training.parts import placement_requests, preload
from miles_agents.errors import ConfigError, InternalError, MilesError, PeerFault
from miles_controller import Controller
from miles_launcher.job_events import Ended, JobEvent
from miles_launcher.job_narrator import JobNarrator
from miles_launcher.job_values import Artefacts, JobResult, JobStatus, State, cluster_status
from miles_launcher.launchers import agent_environment, nodes_of
from miles_launcher.node_provider import Gang, NodeNeed, NodeProvider
from miles_launcher.provided_nodes import NotItsNode, ProvidedNodes
from miles_launcher.train import RESOLVE_S, Answer, read_answer, resolver_failed, resolving

CANCEL_S = 180.0
current_job: contextvars.ContextVar[str] = contextvars.ContextVar("current_job", default="")
"""Name of the job that the running code belongs to, for filters of log records; empty: none."""


class JobCancelled(PeerFault):
    """The job was ended before it was done, because somebody wanted that."""

    code = "E-JOB-003"


class NodeTakenAway(PeerFault):
    """The job was ended in good order because its scheduler took a node away that it needs."""

    code = "E-JOB-004"


class JobWouldNotEnd(InternalError):
    """A job that was told to end has not, in time. It goes on ending."""

    code = "E-JOB-005"


class JobMisused(ConfigError):
    """A job was started twice, awaited before it was started, or asked for what only a running one has."""

    code = "E-JOB-006"


class RunDirectoryTaken(ConfigError):
    """Another job writes into the same run directory."""

    code = "E-JOB-007"


class JobBroke(InternalError):
    """A job ended by an error that is not one of ours; its cause is that error."""

    code = "E-JOB-008"


class Job:
    """One training job. It runs once, in the event loop (of asyncio or uvloop) that calls ``start``.

    Args:
        config: As the resolver gives it; ``from_flags`` makes one.
        nodes: Where its nodes come from; None: what ``--launcher`` says, which is this machine by default.
        name: For people, and in ``NodeNeed``; default: the name of the run directory.
        bind: Where its controller listens: name an address that the nodes reach, with port 0, unless all are local.
        join_s: How long agents may take to join once they are started.
        notices: What the resolver had to say.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        nodes: NodeProvider | None = None,
        name: str = "",
        bind: str = LOOPBACK,
        join_s: float = JOIN_S,
        notices: Sequence[str] = (),
    ) -> None:
        self.run_dir = Path(config["run_dir"]).absolute()
        self.name = name or self.run_dir.name
        self.notices = tuple(notices)
        self._config = {**config, "run_dir": str(self.run_dir)}
        self._provider = nodes
        self._bind = bind
        self._join_s = join_s
        self._state: State = "new"
        self._narrator = JobNarrator(self._move)
        self._task: asyncio.Task[JobResult] | None = None
        self._provided: ProvidedNodes | None = None
        self._ending: MilesError | None = None
        self._error: MilesError | None = None

    @classmethod
    async def from_flags(
        cls,
        flags: Sequence[str],
        *,
        python_path: Sequence[str | Path] = (),
        resolve_timeout_s: float = RESOLVE_S,
        **options: Any,
    ) -> Self:
        """A job from flags of ``train.py``, which a short-lived process reads and checks.

        Args:
            flags: One word each, as in ``sys.argv[1:]``. Relative paths begin at the working directory.
            python_path: Directories where the job's own user code is found, beside this program's.
            options: Of ``Job``: ``nodes``, ``name``, ``bind``, ``join_s``.

        Raises:
            FlagProblems: All that is wrong with them (``problems``).
            UserArgumentsFailed, PassthroughUnreadable: User code or SGLang's parser, as the message says.
            ResolverFailed: The process did not answer in ``resolve_timeout_s``, or crashed.
        """
        where = _absolute(python_path)
        answer = await _resolved(flags, where, resolve_timeout_s)
        config = _config_of(answer)
        if where:
            given = config["env"].get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
            config["env"] = {**config["env"], "PYTHONPATH": os.pathsep.join(filter(None, [*where, given]))}
        return cls(config, notices=answer.notices, **options)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as people may see it: secrets are covered."""
        return for_people(self._config)

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def error(self) -> MilesError | None:
        """What ended it, if it failed or was cancelled."""
        return self._error

    def status(self) -> JobStatus:
        """The job at this moment."""
        progress = self._narrator.progress
        plain = progress.plain()
        nodes, ranks, services = cluster_status(self._narrator.controller)
        return JobStatus(
            name=self.name, state=self._state, run_id=progress.run_id, run_dir=self.run_dir,
            phase=progress.phase, phase_s=plain["phase_s"], rollouts_done=progress.done,
            num_rollout=progress.num_rollout, finished=progress.finished, target=progress.target,
            tokens=progress.tokens, metrics=dict(progress.metrics), nodes=nodes, ranks=ranks, services=services,
            error=self._error,
        )  # fmt: skip

    def metrics(self, event: str = "rollout") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of that kind: ``rollout``, ``eval`` or ``step``; reads the file."""
        path = self.artefacts().metrics
        return [row for row in read_metrics(path) if row["event"] == event] if path.exists() else []

    def artefacts(self) -> Artefacts:
        """Where its files are, as far as it has written them."""
        at = self.run_dir
        return Artefacts(
            at, at / "config.json", at / "metrics.jsonl", at / "events.jsonl", at / "trace.json", at / "logs",
            tuple(self._narrator.saved_checkpoints), tuple(self._narrator.exports),
        )  # fmt: skip

    async def events(self) -> AsyncIterator[JobEvent]:
        """What happens, from the job's begin on (of long ago, the last 1,000), until ``Ended``. For any number of
        listeners; leaving the iteration does nothing to the job."""
        feed = self._narrator.listen()
        try:
            while True:
                event = await feed.next()
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self._narrator.leave(feed)

    # -- its life --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, in the running event loop. Raises JobMisused if it has begun before."""
        if self._task is not None or self._state != "new":
            raise JobMisused(
                f"job {self.name} cannot be started",
                evidence=f"its state is {self._state}",
                advice="Make another Job for another run.",
            )
        self._state = "nodes"
        context = contextvars.copy_context()
        context.run(current_job.set, self.name)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"job {self.name}", context=context)
        self._task.add_done_callback(self._seen)

    async def wait(self) -> JobResult:
        """Until it has ended: the result, or the error that ended it. Cancelling this does nothing to the job.

        Raises:
            JobMisused: It was not started.
            MilesError: What ended it: JobCancelled, NodeTakenAway, HookFailed, JobPartDied, ...
        """
        if self._task is None:
            if self._error is not None:
                raise self._error
            raise JobMisused(f"job {self.name} was not started", evidence="", advice="Call start, or await the job.")
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._ending is not None and self._task.cancelled():  # it was cancelled before it did anything
                raise self._ending from None
            raise

    def __await__(self) -> Generator[Any, None, JobResult]:
        """Start it if need be, and wait until it has ended. Cancelling this cancels the job, in good order."""
        return self._to_the_end().__await__()

    async def _to_the_end(self) -> JobResult:
        if self._task is None and self._state == "new":
            self.start()
        try:
            return await self.wait()
        except asyncio.CancelledError:
            await self.cancel("whoever awaited it was cancelled")
            raise

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """If it still runs, it is cancelled; what it raised is told to whoever waits for it."""
        await self.cancel("its context was left")

    async def cancel(self, reason: str = "", *, timeout_s: float = CANCEL_S) -> None:
        """End it in good order, and wait for that. Idempotent; a job that was not started never will be.

        Raises:
            JobWouldNotEnd: It has not ended within ``timeout_s``, and goes on ending.
        """
        self._end(
            JobCancelled(f"job {self.name} was cancelled", evidence=reason, advice="Start it anew if it is needed.")
        )
        await self._until_ended(timeout_s)

    async def stack(self, rank: str) -> str:
        """The Python stacks of a rank: ``trainer-1``, ``trainer[1]`` or ``1``. Raises NoSuchRank, WorkerDied, ..."""
        from miles_controller.run_orders import RunOrders

        return str((await RunOrders(self._running()).stack({"rank": rank}))["stack"])

    # -- nodes -----------------------------------------------------------------------------------------------

    def node_lost(self, name: str, why: str) -> None:
        """The scheduler knows that a node is gone with everything on it: what ran there has died, at once. The job then
        recovers or ends as after any death."""
        self._nodes_of_its_own().node(name)
        self._running().report_node_exit(name, why)

    async def take_away(self, name: str, reason: str, *, timeout_s: float = CANCEL_S) -> None:
        """The scheduler wants a node back: returns when nothing of the job is there. If the job needs the node, it ends
        in good order with NodeTakenAway; else it goes on without.

        Raises:
            NotItsNode: The job has no such node.
            JobWouldNotEnd: It has not ended within ``timeout_s``.
        """
        provided = self._nodes_of_its_own()
        provided.node(name)
        if provided.is_idle(name) and self._state == "running":
            await provided.leave(name, reason)
            return
        self._end(
            NodeTakenAway(
                f"job {self.name} has lost node {name}",
                evidence=reason,
                advice="Start it anew with --load from its last checkpoint when there are nodes.",
                node=name,
            )
        )
        await self._until_ended(timeout_s)

    # -- inside ----------------------------------------------------------------------------------------------

    def _move(self, state: State) -> None:
        if self._state not in ("finished", "failed", "cancelled", "ending"):
            self._state = state

    def _end(self, why: MilesError) -> None:
        if self._task is None:
            if self._state == "new":
                self._told_end("cancelled", why)
        elif not self._task.done() and self._ending is None:  # once: a second time would break off the end
            self._ending, self._state = why, "ending"
            self._task.cancel()

    async def _until_ended(self, timeout_s: float) -> None:
        if self._task is None:
            return
        await asyncio.wait({self._task}, timeout=timeout_s)
        if not self._task.done():
            left = ", ".join(one.name for one in self.status().nodes if one.state in ("alive", "suspect")) or "none"
            raise JobWouldNotEnd(
                f"job {self.name} has not ended within {timeout_s:g} s",
                evidence=f"nodes that are still there: {left}; logs: {self.run_dir / 'logs'}",
                advice="Wait for it; if its processes are stuck in the kernel, look at dmesg on their nodes.",
            )

    async def _run(self) -> JobResult:
        try:
            with _held(self.run_dir):
                outcome = await run_job(self._config, self._nodes(), narrator=self._narrator, on_stop=self._on_stop)
        except asyncio.CancelledError:
            self._told_end("cancelled", self._ending or self._cancelled_from_outside())
            if self._ending is None:
                raise
            raise self._ending from None
        except Exception as caught:  # boundary: whatever ended the job is told
            error = _told_error(first_of(caught))
            self._told_end("failed", error)
            if error is caught:
                raise
            raise error from caught
        self._told_end("finished", None)
        return self._result(outcome)

    def _told_end(self, outcome: Any, error: MilesError | None) -> None:
        self._state, self._error = outcome, error
        self._narrator.ended(Ended(outcome, error))

    def _seen(self, task: asyncio.Task[JobResult]) -> None:
        """It is over, perhaps before it began. Its error has been told as an event: nobody has to fetch it."""
        if not task.cancelled():
            task.exception()
        elif self._error is None:
            self._told_end("cancelled", self._ending or self._cancelled_from_outside())

    def _cancelled_from_outside(self) -> JobCancelled:
        return JobCancelled(
            f"the task of job {self.name} was cancelled",
            evidence="by its event loop, or by whoever has all tasks of it",
            advice="Start it anew if it is needed.",
        )

    def _on_stop(self, by: str) -> None:
        self._end(JobCancelled(f"job {self.name} was stopped", evidence=f"by {by}", advice="Start it anew if needed."))

    def _nodes(self) -> Nodes:
        if self._provider is None:
            return nodes_of(self._config)
        provider, config = self._provider, self._config

        def start(controller: Controller, run_dir: Path) -> AbstractAsyncContextManager[Any]:
            self._provided = ProvidedNodes(
                provider, need_of(config, self.name), controller, run_dir,
                preload=preload(config), env=agent_environment(config),
            )  # fmt: skip
            return self._provided

        return Nodes((), start, bind=self._bind, join_s=self._join_s)

    def _result(self, outcome: Outcome) -> JobResult:
        return JobResult(
            outcome.num_iterations, outcome.first_eval, outcome.last_eval, tuple(outcome.examples), self.artefacts()
        )

    def _running(self) -> Controller:
        controller = self._narrator.controller
        if controller is None:
            raise JobMisused(
                f"job {self.name} does not run", evidence=f"its state is {self._state}", advice="Ask while it does."
            )
        return controller

    def _nodes_of_its_own(self) -> ProvidedNodes:
        if self._provided is None or self._narrator.controller is None:
            raise NotItsNode(
                f"job {self.name} has no nodes of a provider now",
                evidence=f"its state is {self._state}",
                advice="Ask while it runs, of a job that was made with nodes=.",
            )
        return self._provided


def need_of(config: Mapping[str, Any], job: str) -> NodeNeed:
    """What a job of this config asks its provider for."""
    requests = placement_requests(config)
    gangs = tuple(Gang(one.name, one.num_ranks, one.devices_per_rank) for one in requests)
    devices = sum(one.num_ranks * one.devices_per_rank for one in requests if one.colocate_with is None)
    return NodeNeed(job, "cpu" if config["device"] == "cpu" else "gpu", devices, gangs)


def _absolute(paths: Sequence[str | Path]) -> list[str]:
    return [str(Path(path).absolute()) for path in paths]


async def _resolved(flags: Sequence[str], python_path: Sequence[str], timeout_s: float) -> Answer:
    command, env = resolving(flags, python_path)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        raise resolver_failed(f"it did not answer in {timeout_s:g} s", None) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return read_answer(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def _config_of(answer: Answer) -> dict[str, Any]:
    if answer.problems:
        raise FlagProblems(answer.problems)
    if answer.error or answer.config is None:
        text, code = str(answer.error.get("text", "")), answer.error.get("code")
        for kind in (UserArgumentsFailed, PassthroughUnreadable):
            if code == kind.code:
                raise kind("the flags could not be read", evidence=text, advice="Correct what the evidence shows.")
        raise ResolverFailed("the flags could not be read", evidence=text, advice="Correct what the evidence shows.")
    if answer.config["dry_run"]:
        what = "shows what would be started and starts nothing"
        raise FlagProblems([Problem("--dry-run", "", what, "", "Leave it out, or use train.py.")])
    return answer.config


def _told_error(error: BaseException) -> MilesError:
    if isinstance(error, MilesError):
        return error
    return JobBroke(
        "the job ended by an unexpected error",
        evidence=f"{type(error).__name__}: {error}",
        advice="Look at its traceback (the cause of this error), and report it unless your code is at fault.",
    )


@contextmanager
def _held(run_dir: Path) -> Generator[None, None, None]:
    """No other job writes there meanwhile. Raises RunDirectoryTaken."""
    with suppress(OSError):
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is wrong with it is told by the job
    try:
        fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryTaken(
                f"{run_dir} is the run directory of another job",
                evidence="a job that runs holds it",
                advice="Give each job a --run-dir of its own, or leave it out.",
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(fd)
