"""Recovery of the trainer's ranks and of the rollout manager (``--use-fault-tolerance``): the shell around
``recovery_plan`` and ``keeper``.

Consumes: deaths and silence of their processes; what the loop tells of its progress. Produces: successors in the state
of their predecessors, an event and a line for each recovery, checkpoints in the run directory where ``--save`` makes
none for long. Waits for: processes to start, models to load, batches to be trained again, each with a deadline or for
as long as the process lives. Invariants:

* ``trained`` is the last rollout whose training has ended on all ranks; ranks that begin anew are brought there: the
  newest checkpoint, then the journal's batches one after the other, which is all that had happened to those before
  them. A call that a death ended is made after that, so each batch is trained on once in every history of weights.
* a batch leaves the journal only when a complete checkpoint has it.
* the rollout manager comes first: the journal is its.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from miles.backends.checkpoint_layout import find_checkpoint, iteration_name
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.training.heartbeats import watch_heartbeats
from miles.training.keeper import DEATH_S, DiedAgain, Keeper, Lasting, is_death, is_final
from miles.training.recovery_plan import Checkpoint, Replay, is_checkpoint_due, plan_replay
from miles_agents import Ref
from miles_agents.errors import PeerFault
from miles_agents.rpc.errors import DeadlineExceeded
from miles_controller import Controller, OwnedMesh, Policy

logger = logging.getLogger(__name__)
T = TypeVar("T")
CALL_S = 600.0
LONG_S = 7 * 24 * 3600.0
MAX_JOURNAL_BYTES = 8 << 30
CRITIC = "_critic"
POLICY = Policy("restart", max_restarts=3, window_s=600.0)


@dataclass
class Starts:
    """How parts are started, by the ways of ``parts``: a mesh that is up but not initialised, and the rest of it.

    Attributes:
        trainer: Given a config, the ranks; ``init_trainer`` has them meet and load, and gives their first rollout.
        rollout: The rollout manager; ``init_rollout`` tells it the engines, and loads prompts.
    """

    trainer: Callable[[Mapping[str, Any]], Any]
    init_trainer: Callable[[OwnedMesh, Mapping[str, Any]], Any]
    rollout: Callable[[], Any]
    init_rollout: Callable[[OwnedMesh], Any]


class Recovery:
    """See the module's docstring. Made when all parts are up; ``running`` for as long as the loop is.

    Args:
        config: The run's, with the steps of ``--load`` and ``--critic-load`` pinned (``pinned``).
        start: The run's first rollout.
        death_s: How long after an error a death may come that explains it.
    """

    def __init__(
        self,
        controller: Controller,
        config: Mapping[str, Any],
        starts: Starts,
        *,
        rollout: OwnedMesh,
        trainer: OwnedMesh | None,
        fleet: EngineFleet | None,
        start: int,
        death_s: float = DEATH_S,
    ) -> None:
        self.config = config
        self.trained = start - 1
        self.next_version = 0
        """Of the weights that engines are about to get while a rollout may be under way; 0: none is announced."""
        self.say: Callable[[str], None] = logger.info
        self._controller = controller
        self._starts = starts
        self._fleet = fleet
        self._start = start
        self._death_s = death_s
        self._newest: Checkpoint | None = None
        self._replay = Replay(None)
        self._replaying: dict[int, list[Ref]] = {}
        self._own = Path(config["run_dir"]) / "recovery" / "checkpoints"
        self._rollout = Keeper(rollout, self._rebuild_rollout, self._rollout_is_back, policy=POLICY, death_s=death_s)
        self._keepers = [self._rollout]
        if trainer is not None:
            # Where memory changes hands, ranks may begin only when it is their turn to have it.
            eager = not config["offload_train"]
            self._trainer = Keeper(
                trainer, self._rebuild_trainer, self._trainer_is_back,
                policy=POLICY, eager=eager, death_s=death_s,
                beside=lambda keeper, mesh: watch_heartbeats(keeper, mesh, config),
            )  # fmt: skip
            self._keepers.append(self._trainer)

    def calls(self, name: str, timeout_s: float) -> Lasting:
        """The part of that name as the loop sees it."""
        keeper = next(keeper for keeper in self._keepers if keeper.name == name)
        return Lasting(keeper, lambda mesh: mesh.options(timeout_s=timeout_s))

    def mesh(self, name: str) -> OwnedMesh:
        """The part of that name as it is now, perhaps dead."""
        return next(keeper.mesh for keeper in self._keepers if keeper.name == name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deaths are answered inside."""
        tasks = [asyncio.ensure_future(keeper.run()) for keeper in self._keepers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def given_up(self) -> BaseException:
        """Waits for the error with which a part was given up."""
        lost = [keeper.lost for keeper in self._keepers]
        done, _ = await asyncio.wait(lost, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()

    # -- what the loop tells ---------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Before the first rollout: the rollout manager keeps its state from now on, and nothing of before counts."""
        await asyncio.to_thread(shutil.rmtree, self._own.parent, ignore_errors=True)
        await self._rollout_calls().keep.call_one(self._start - 1)

    async def saved(self, rollout_id: int) -> None:
        """``--save`` has a complete checkpoint of this rollout."""
        root = str(self.config["save"])
        critic = str(self.config.get("critic_save") or root.rstrip("/") + CRITIC)
        await self._covered(Checkpoint(root, critic, rollout_id))

    async def after(self, rollout_id: int) -> bool:
        """The iteration of this rollout is over, without a checkpoint. Writes one in the run directory, if the journal
        has become long; whether it did."""
        if len(self._keepers) == 1:
            await self._rollout_calls().covered.call_one(rollout_id)
            return False
        kept, num_bytes = await self._rollout_calls().kept.call_one()
        limits = {"max_batches": int(self.config["recovery_interval"]), "max_bytes": MAX_JOURNAL_BYTES}
        if not is_checkpoint_due(len([n for n in kept if n <= rollout_id]), num_bytes, **limits):
            return False
        await self.calls("trainer", LONG_S).save.call(rollout_id, str(self._own))
        await self._covered(Checkpoint(str(self._own), str(self._own) + CRITIC, rollout_id))
        return True

    async def _covered(self, checkpoint: Checkpoint) -> None:
        self._newest = checkpoint
        await self._rollout_calls().covered.call_one(checkpoint.rollout_id)
        await asyncio.to_thread(_remove_others, self._own, checkpoint)

    # -- the rollout manager ---------------------------------------------------------------------------------

    def _rollout_calls(self) -> Lasting:
        return self.calls("rollout", CALL_S)

    async def _rebuild_rollout(self, dead: OwnedMesh, begun: Callable[[OwnedMesh], None]) -> OwnedMesh:
        await dead.stop(grace_s=0.0)
        mesh = await _begun(self._starts.rollout())
        begun(mesh)
        try:
            await self._starts.init_rollout(mesh)
            version = 0 if self._fleet is None else self._fleet.weight_version
            told = (self.trained, version, self.next_version, self._replaying)
            await mesh.options(timeout_s=CALL_S).recover.call_one(*told)
        except Exception as error:
            await _end(mesh, error, self._death_s)
            raise
        return mesh

    def _rollout_is_back(self, cause: str, seconds: float) -> None:
        begun = self.trained >= self._start
        state = f"state after rollout {self.trained}" if begun else "the run's beginning"
        self._tell("the rollout manager", state, cause, seconds)

    # -- the trainer -----------------------------------------------------------------------------------------

    async def _rebuild_trainer(self, dead: OwnedMesh, begun: Callable[[OwnedMesh], None]) -> OwnedMesh:
        await dead.stop(grace_s=0.0)
        kept, _ = await self._rollout_calls().kept.call_one()
        self._replay = plan_replay(self._newest, start=self._start, trained=self.trained, kept=kept)
        found = self._replay.checkpoint
        config = {**self.config, **({} if found is None else found.flags(self.config))}
        mesh = await _begun(self._starts.trainer(config))
        begun(mesh)
        try:
            await _answered(self._starts.init_trainer(mesh, config))
            for rollout_id in self._replay.rollouts:
                await self._train_again(mesh, rollout_id)
        except Exception as error:
            await _end(mesh, error, self._death_s)
            raise
        return mesh

    async def _train_again(self, mesh: OwnedMesh, rollout_id: int) -> None:
        """What is replayed leaves the store, whether the ranks live or not; a rollout manager that dies meanwhile does
        not take it along."""
        refs = await self._rollout_calls().replay.call_one(rollout_id)
        self._replaying = {rollout_id: refs}
        try:
            await _answered(mesh.options(timeout_s=LONG_S).train.call(rollout_id, refs))
        except Exception:
            await self._replayed(rollout_id)
            raise
        await self._replayed(rollout_id)

    async def _replayed(self, rollout_id: int) -> None:
        await self._rollout_calls().replayed.call_one(rollout_id)
        self._replaying = {}

    def _trainer_is_back(self, cause: str, seconds: float) -> None:
        found, again = self._replay.checkpoint, len(self._replay.rollouts)
        origin = "the run's beginning" if found is None else f"the checkpoint of rollout {found.rollout_id}"
        what = "the trainer's " + ("rank" if len(self._trainer.mesh) == 1 else f"{len(self._trainer.mesh)} ranks")
        self._tell(what, f"{origin}, {again} rollout{'' if again == 1 else 's'} trained again", cause, seconds)

    def _tell(self, what: str, how: str, cause: str, seconds: float) -> None:
        text = f"recovered {what} in {seconds:.1f} s ({how}) after: {cause.splitlines()[0] if cause else 'a death'}"
        self._controller.events.emit("recovered", what, text, cause=cause, seconds=round(seconds, 3))
        self.say(text)


def pinned(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the checkpoints named that ``--load`` and ``--critic-load`` mean now: ranks that begin anew must
    not take newer ones, which the run itself wrote there."""
    steps: dict[str, Any] = {}
    for load, step in (("load", "ckpt_step"), ("critic_load", "critic_ckpt_step")):
        found = find_checkpoint(config.get(load), config.get(step))
        if found is not None and found.rollout_id is not None and found.directory != Path(config[load]):
            steps[step] = found.rollout_id
    return {**config, **steps}


async def _begun(starting: Any) -> OwnedMesh:
    """A mesh that is started in place of one that died; processes that do not come up are deaths, too."""
    try:
        mesh: OwnedMesh = await starting
    except PeerFault as error:
        raise DiedAgain("it did not start", evidence=f"{error.what}: {error.evidence}", advice="") from error
    return mesh


async def _answered(call: Awaitable[T]) -> T:
    """A call of ranks that are being brought back. One that has no answer in its time is a hang, and that a death."""
    try:
        return await call
    except DeadlineExceeded as error:
        raise DiedAgain("it hung", evidence=f"{error.what}: {error.evidence}", advice="") from error


async def _end(mesh: OwnedMesh, error: Exception, death_s: float) -> None:
    """Nothing is left of an attempt that failed. Raises DiedAgain if it failed by a death of its own."""
    may_be = not isinstance(error, DiedAgain) and not is_final(mesh, error)
    died = may_be and await is_death(mesh, error, death_s)
    failure = mesh.failure
    await mesh.stop(grace_s=0.0)
    if died and failure is not None:
        raise DiedAgain("it died", evidence=failure.evidence or failure.what, advice="") from error


def _remove_others(own: Path, checkpoint: Checkpoint) -> None:
    """Recovery checkpoints that are not the newest any more."""
    for root in (own, own.with_name(own.name + CRITIC)):
        for path in root.glob("iter_*"):
            if str(own) != checkpoint.root or path.name != iteration_name(checkpoint.rollout_id):
                shutil.rmtree(path, ignore_errors=True)
