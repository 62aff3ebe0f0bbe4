"""One training job from its resolved config to its exit code: the controller, its nodes, the parts, the loop, the end.

Consumes: a config as ``miles.flags`` resolves it, and the nodes that a launcher brings. Produces: the run
directory (config, logs, events, metrics, journal), checkpoints, the exit code; on the terminal the story. Waits for:
the loop, a death, or the user's Ctrl-C. Invariants: whatever ends the job, no process of it is left when ``run``
returns; an error is told once, the user's own traceback first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import uvloop

from miles.tracking.console import RunConsole
from miles.tracking.hub import Tracking
from miles.tracking.narrator import Narrator
from miles.tracking.plot import PLOT_NAME
from miles.tracking.secrets import for_people, take_secrets
from miles.training.async_loop import loop_class
from miles.training.errors import exit_code, first_of, story
from miles.training.exit_codes import EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED
from miles.training.loop import Outcome
from miles.training.parts import Parts, start
from miles.training.watch import run_watched
from miles_agents.errors import MilesError
from miles_agents.run_files import UnusableRunDirectory, usable_directory
from miles_controller import Controller, ControllerConfig

logger = logging.getLogger(__name__)

StartNodes: TypeAlias = Callable[[Controller, Path], AbstractAsyncContextManager[Any]]
"""Given a controller that listens and the run directory: starts its agents on entering, ends them on leaving."""

_PLOT_S = 60.0
JOIN_S = 120.0
LOOPBACK = "tcp://127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a launcher brings.

    Attributes:
        names: The nodes that are to join, in the order in which they are filled: the first is the head of the run.
        start: Starts their agents. What it raises on entering says for each node why it cannot be used.
        bind: Where the controller listens: loopback where all nodes are this machine, else the address that the nodes
            reach it at.
        join_s: They have joined so many seconds after ``start`` was entered, or are missing.
    """

    names: tuple[str, ...]
    start: StartNodes
    bind: str = LOOPBACK
    join_s: float = JOIN_S


def run(config: dict[str, Any], nodes: Nodes, *, console: RunConsole | None = None) -> int:
    """Run the job to its end in an event loop of its own; returns the exit code.

    0: done. 1: the run failed. 2: it failed for something that the user's flags or files have to change. 130: Ctrl-C.
    143: SIGTERM.
    """
    shown = console or RunConsole()
    config, secrets = take_secrets(config)
    try:
        run_dir = _prepared_directory(config)
    except MilesError as error:
        shown.say(story(error))
        return exit_code(error)
    with _logging_to(run_dir / "logs" / "controller.log", shown):
        return _run(config, nodes, shown, run_dir, secrets)


def _prepared_directory(config: dict[str, Any]) -> Path:
    """The run directory, for its user alone if it is new, with the config in it. Raises UnusableRunDirectory."""
    path = Path(config["run_dir"])
    is_new = not path.exists()
    run_dir = usable_directory(path)
    try:
        if is_new:
            run_dir.chmod(0o700)  # prompts, answers, and what --env holds
        (run_dir / "logs").mkdir(exist_ok=True)
        written = json.dumps(for_people(config), indent=1, sort_keys=True)
        (run_dir / "config.json").write_text(written + "\n", encoding="utf-8")
    except OSError as error:
        raise UnusableRunDirectory.because(run_dir, error) from None
    return run_dir


def _run(config: dict[str, Any], nodes: Nodes, shown: RunConsole, run_dir: Path, secrets: dict[str, str]) -> int:
    ended_by: list[str] = []
    shown.run_dir = run_dir
    try:
        tracking = Tracking(config, run_dir, shown.say, secrets)
        with shown.live(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(_main(config, nodes, shown, tracking, ended_by))
    except KeyboardInterrupt:
        shown.say(f"interrupted; everything has ended. Logs: {run_dir / 'logs'}")
        return EXIT_INTERRUPTED
    except asyncio.CancelledError:
        shown.say(
            f"terminated{f' by {ended_by[0]}' if ended_by else ''}; everything has ended. Logs: {run_dir / 'logs'}"
        )
        return EXIT_TERMINATED if ended_by else EXIT_INTERRUPTED
    except Exception as caught:  # boundary: whatever ended the job is told
        error = first_of(caught)
        logger.exception("the job failed", exc_info=error)
        shown.say(f"\nthe run failed: {story(error)}\n  logs: {run_dir / 'logs'}")
        return exit_code(error)
    shown.finish(outcome.first_eval, outcome.last_eval, outcome.examples)
    if shown.shows_reward:
        _draw_plot(run_dir, shown)
    return EXIT_OK


async def run_job(
    config: dict[str, Any], nodes: Nodes, *, narrator: Narrator, on_stop: Callable[[str], None] | None = None
) -> Outcome:
    """The job as an awaitable, for programs that have an event loop. Raises what ended it; cancel it to end it in good
    order. It writes to its run directory only, and leaves signals, logging and environment of the process alone.

    Args:
        narrator: Told how the job goes.
        on_stop: Called when ``miles stop`` wants the job's end, with who asked; None: it cannot be stopped that way.
    """
    config, secrets = take_secrets(config)
    run_dir = _prepared_directory(config)
    return await _job(config, nodes, narrator, Tracking(config, run_dir, narrator.say, secrets), on_stop)


async def _main(
    config: dict[str, Any], nodes: Nodes, shown: RunConsole, tracking: Tracking, ended_by: list[str]
) -> Outcome:
    task = asyncio.current_task()

    def end(by: str) -> None:
        if not ended_by and task is not None:  # once: a second one would break off the end
            task.cancel()
        ended_by.append(by)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end, "SIGTERM")
    ticking = asyncio.create_task(shown.tick())
    try:
        return await _job(config, nodes, shown, tracking, end)
    finally:
        ticking.cancel()


async def _job(
    config: dict[str, Any],
    nodes: Nodes,
    shown: Narrator,
    tracking: Tracking,
    on_stop: Callable[[str], None] | None,
) -> Outcome:
    run_dir, how = tracking.run_dir, "failed"
    try:
        await tracking.open()
        options = ControllerConfig(bind=nodes.bind, nodes=nodes.names, run_dir=run_dir, env=config.get("env") or {})
        controller = Controller(options)
        controller.on_stop = on_stop
        async with controller, _attached(controller, shown), nodes.start(controller, run_dir):
            shown.say(f"run {controller.run_id}, directory {run_dir}")
            with shown.phase("nodes"):
                await controller.wait_for_nodes(timeout_s=nodes.join_s)
            with shown.phase("start"):
                parts = await start(controller, config)
            if parts.num_too_long:
                shown.say(f"note: {parts.num_too_long} prompts are left out: they leave no room for an answer")
            tracking.begin(controller.run_id, parts.start_rollout_id)
            try:
                async with _recovering(parts, shown):
                    outcome = await run_watched(parts, loop_class(config)(parts, config, tracking, shown).run())
                how = "finished"
                return outcome
            finally:
                if parts.fleet is not None:
                    await parts.fleet.stop()
    except asyncio.CancelledError:
        how = "interrupted"
        raise
    finally:
        await tracking.close(how)


@asynccontextmanager
async def _attached(controller: Controller, shown: Narrator) -> AsyncIterator[None]:
    shown.attached(controller)
    try:
        yield
    finally:
        shown.detached()


@asynccontextmanager
async def _recovering(parts: Parts, shown: Narrator) -> AsyncIterator[None]:
    """Deaths are answered inside, with ``--use-fault-tolerance``."""
    if parts.recovery is None:
        yield
        return
    parts.recovery.say = shown.say
    async with parts.recovery.running():
        yield


class _Warnings(logging.Handler):
    """Warnings of the runtime, one line each, where the person looks. Never raises."""

    def __init__(self, shown: RunConsole) -> None:
        super().__init__(logging.WARNING)
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """Show the first line; the file has the rest."""
        if record.exc_info is None:  # an error with a traceback is told as the story of the run's end
            self._shown.say(f"warning: {record.getMessage().splitlines()[0]}")


@contextmanager
def _logging_to(path: Path, shown: RunConsole) -> Iterator[None]:
    """What this process logs goes to a file; warnings also to the terminal."""
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: tuple[logging.Handler, ...] = (file, _Warnings(shown))
    root = logging.getLogger()
    before = root.level
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
        file.close()


def _draw_plot(run_dir: Path, shown: RunConsole) -> None:
    """Best effort: a run is no worse for a missing picture, but it is told why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "miles.tracking.plot", str(run_dir)],
            capture_output=True, text=True, timeout=_PLOT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        shown.say(f"no {PLOT_NAME}: {error}")
        return
    if done.returncode == 0:
        shown.say(f"plot: {run_dir / PLOT_NAME}")
    elif "No module named 'matplotlib'" in done.stderr:
        shown.say(f"no {PLOT_NAME}: matplotlib is not installed (pip install 'miles[demo]')")
    else:
        shown.say(f"no {PLOT_NAME}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'unknown'}")
