"""The rollout manager: the actor that turns prompts into train data. User code of rollouts runs here.

Consumes calls of the job, prompts of the data source, answers of engines. Produces train data in the store, metrics,
a journal. Waits for the rollout function (the engines behind it have deadlines; user code is the user's) and for the
store. What unblocks it: answers, errors, cancellation of the call. Invariants: coroutines of user code run on a loop of
their own and its ordinary functions in a pool, so endpoints answer, calls can be cancelled and heartbeats go on
whatever it does; every prompt group is in the ledger; nothing saved before is touched until what replaces it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from miles.backends.weight_update.messages import EngineTarget
from miles.rollout import debug_data, manager_state
from miles.rollout.base_types import Group, RolloutFnEvalInput, RolloutFnTrainInput, RolloutFnTrainOutput
from miles.rollout.batch_journal import Batch, BatchJournal
from miles.rollout.engines import engines
from miles.rollout.filter_hub.dynamic_sampling_filters import flat
from miles.rollout.generate_utils.openai_endpoint_utils import close_agent_server
from miles.rollout.hooks import close_hook_pool, load_hook
from miles.rollout.inference_rollout.compatibility import call_rollout_function
from miles.rollout.inference_rollout.inference_rollout_common import SharedGenerateState, need_rewards
from miles.rollout.loading import Loaded, load_all
from miles.rollout.messages import EvalResult, RolloutBatchRefs
from miles.rollout.metrics import eval_examples, eval_metrics, rollout_metrics
from miles.rollout.progress import progress_now
from miles.rollout.recovery import RolloutRecovery
from miles.rollout.rm_hub.grader_pool import close_grader_pool, take_num_lost
from miles.rollout.train_data import convert, trim, untrained
from miles.rollout.trajectories import save_trajectories
from miles.rollout.watchdog import Watchdog
from miles.utils.arguments import namespace
from miles.utils.async_utils import LoopThread, set_loop_thread
from miles.utils.http_utils import close_http_client, http_client
from miles.utils.metric_utils import numbers_of
from miles.utils.misc import SingletonMeta
from miles.utils.spans import Span
from miles.utils.tracking_utils import take_logged
from miles.utils.train_data import split_train_data
from miles.utils.types import Sample
from miles_agents import Actor, Ref, endpoint, store
from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class NotStarted(ConfigError):
    """The rollout manager is asked for something before ``start``."""

    code = "E-ROLL-010"


class RolloutManager(Actor):
    """See the module's docstring.

    Args:
        config: The run's values; user code sees them as ``args``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.args = namespace(config)
        self.progress_now = progress_now
        progress_now.begin("loading", -1)
        self.weight_version: int | None = None
        self.user = LoopThread("user-code")
        set_loop_thread(self.user)
        self.watchdog = Watchdog(self.user, self.progress_now)
        self._restored_weight_version = 0
        self._first_weight_version: int | None = None
        self._refs: dict[int, list[Ref]] = {}
        self._replayed: dict[int, list[Ref]] = {}
        self._recovery: RolloutRecovery | None = None
        self._loaded: Loaded | None = None
        # Reading prompts and importing transformers takes seconds, in which engines start.
        self._loading: Future[Loaded] = asyncio.run_coroutine_threadsafe(
            asyncio.to_thread(load_all, self.args), self.user.loop
        )

    def close(self) -> None:
        """End threads, graders and connections."""
        self.watchdog.close()
        if self._loaded is not None and self._loaded.keeps_groups_open:
            function: Any = self._loaded.rollout_function.function
            self.user.run(function.close())
        set_loop_thread(None)
        self.user.stop()
        close_agent_server()
        close_hook_pool()
        close_grader_pool()
        close_http_client()
        SingletonMeta.clear_instances(SharedGenerateState)
        if self._loaded is not None:
            self._loaded.source.close()

    # -- endpoints -------------------------------------------------------------------------------------------

    @endpoint
    async def start(self, targets: list[EngineTarget], router_url: str, api_key: str) -> dict[str, int | None]:
        """Everything is loaded, and these engines are used from now on.

        Args:
            targets: The engines; none where no engine is needed.
            router_url: Of the router in front of them.
            api_key: That the router asks for.

        Returns:
            ``dataset_size``: prompts that there are, without those that are too long; ``num_rollout_per_epoch``: that
            by ``--rollout-batch-size``, rounded down. Both None if the data source has no data set.
            ``num_too_long``: prompts that were left out; ``max_prompt_len``: because they have more tokens than this.

        Raises:
            MilesError: Of data, tokenizer or user code that cannot be loaded.
        """
        self.set_engines_now(targets, router_url, api_key)
        self._loaded = await asyncio.wrap_future(self._loading)
        self._loaded.source.weights_are(self.weight_version)
        self.progress_now.begin("idle", -1)
        size = self._loaded.dataset_size
        return {
            "dataset_size": size,
            "num_rollout_per_epoch": None if size is None else size // int(self.args.rollout_batch_size),
            "num_too_long": self._loaded.num_too_long,
            "max_prompt_len": self.args.rollout_max_prompt_len,
        }

    @endpoint
    async def set_engines(self, targets: list[EngineTarget], router_url: str, api_key: str) -> None:
        """The engines have changed."""
        self.set_engines_now(targets, router_url, api_key)

    @endpoint(group="generate")
    async def generate(self, rollout_id: int) -> RolloutBatchRefs:
        """One rollout's train data, in the store.

        Raises:
            HookFailed: User code raised. EnginesFail, NothingToTrain and others of docs/errors.md.
        """
        loaded = self._needed()
        if self._recovery is not None and (made := await self._recovery.again(rollout_id)) is not None:
            return made.answer
        loaded.source.begin(rollout_id)
        began = time.perf_counter()
        try:
            output = await self._collect(rollout_id)
            rollout_time = time.perf_counter() - began
            self.progress_now.phase = "convert"
            groups = output.samples
            kept, surplus = (groups, []) if self.args.debug_rollout_only else trim(self.args, groups)
            loaded.source.give_back(surplus, "trimmed")
            metrics = await self._on_user_loop(self._rollout_metrics(rollout_id, kept, output, rollout_time))
            if num_lost := take_num_lost():
                metrics["rollout/lost_gradings"] = float(num_lost)
            parts, refs, num_dropped = await self._ship(rollout_id, kept)
            if num_dropped:
                metrics["rollout/dropped_samples"] = float(num_dropped)
            answer = RolloutBatchRefs(refs, metrics, _num_samples(self.args, kept, parts))
            if self._recovery is not None:
                work = self._recovery.shipped(self._counters(), rollout_id, Batch(answer, parts))
                await self._on_user_loop(work)
        except BaseException:
            loaded.source.not_trained(rollout_id)
            if not loaded.keeps_groups_open:
                loaded.source.take_back_open(rollout_id, "failed")
            raise
        finally:
            self.progress_now.phase = "idle"
        return answer

    @endpoint(group="evaluate")
    async def evaluate(self, rollout_id: int) -> EvalResult:
        """Evaluate the data sets that the flags name.

        Raises:
            HookFailed: User code raised. RequestFailed and others of docs/errors.md.
        """
        loaded = self._needed()
        try:
            return await self._on_user_loop(self._evaluate(loaded, rollout_id))
        finally:
            self.progress_now.phase = "idle"

    @endpoint
    async def trained(self, rollout_id: int) -> int:
        """The rollout was trained on: its groups end so in the ledger, its data leaves the store. How many groups."""
        count = self._needed().source.trained(rollout_id)
        for ref in self._refs.pop(rollout_id, []):
            await self._remove(ref)
        return count

    @endpoint
    async def keep(self, rollout_id: int) -> None:
        """``--use-fault-tolerance``: keep what a successor needs, from the state after this rollout on, which is now.

        Raises:
            CannotSave, NotSavable, HookFailed.
        """
        self._recovery = self._new_recovery()
        await self._on_user_loop(self._recovery.begin(self._counters(), rollout_id))

    @endpoint
    async def recover(
        self, trained: int, weight_version: int, next_version: int, replaying: dict[int, list[Ref]]
    ) -> None:
        """Go on where a manager that died was.

        Args:
            trained: The last rollout that was trained on.
            weight_version: What engines have now; 0: nobody gave them any.
            next_version: What they are about to get; 0: nobody gives them any.
            replaying: Rollouts that the manager before this one has given out by ``replay``, and of which it was not
                told ``replayed`` yet.

        Raises:
            NoStateKept, HookFailed.
        """
        self._recovery = self._new_recovery()
        self._replayed = dict(replaying)
        counters = await self._on_user_loop(self._recovery.restore(trained))
        self.weight_version = weight_version or counters.get("weight_version")
        self._needed().source.weights_are(self.weight_version)
        self._needed().source.weights_are(next_version or None, announced=True)
        for rollout_id in self._recovery.batches.rollouts():
            if rollout_id < trained:
                continue  # its data has left the store
            batch = await asyncio.to_thread(self._recovery.batches.read, rollout_id)
            self._refs[rollout_id] = batch.answer.refs
        await self.trained(trained)
        # What was put into the store and told to nobody: the manager died between the two.
        known = [*self._refs.values(), *self._replayed.values()]
        await self._remove_left([ref for refs in known for ref in refs])

    @endpoint
    async def kept(self) -> tuple[list[int], int]:
        """Rollouts whose batches the journal has, and how many bytes it has in all."""
        batches = self._kept_batches()
        return await asyncio.to_thread(lambda: (batches.rollouts(), batches.num_bytes()))

    @endpoint
    async def replay(self, rollout_id: int) -> list[Ref]:
        """A kept batch into the store once more, until ``replayed``. Raises DamagedBatch."""
        batch = await asyncio.to_thread(self._kept_batches().read, rollout_id)
        await self.replayed(rollout_id)  # the ranks for whom it was there before have died
        self._replayed[rollout_id] = refs = await self._put(batch.parts)
        return refs

    @endpoint
    async def replayed(self, rollout_id: int) -> None:
        """What ``replay`` put into the store is not needed any more."""
        for ref in self._replayed.pop(rollout_id, []):
            await self._remove(ref)

    @endpoint
    async def covered(self, rollout_id: int) -> None:
        """A checkpoint has this rollout: batches up to it are not kept any longer."""
        await asyncio.to_thread(self._kept_batches().remove_through, rollout_id)

    @endpoint
    async def spans(self) -> list[Span]:
        """When engines were at work for this process, since it was last asked: for the trace of the run."""
        return http_client().generating.take()

    @endpoint
    async def set_weight_version(self, version: int) -> None:
        """The engines' weights are of this version from now on."""
        self.weight_version = version
        if self._loaded is not None:
            self._loaded.source.weights_are(version)
        if self._first_weight_version is None:
            self._first_weight_version = version

    @endpoint
    async def may_become(self, version: int) -> bool:
        """Weights are about to become ``version`` although a rollout may be under way. False: they must not, because
        one was judged by those of now, and is handed over; it has to be trained on first."""
        return self._needed().source.may_become(version)

    def _oldest_version(self) -> int | None:
        """With ``--keep-old-actor``: the trainer has the weights of the version before the engines' own, too; not
        those from before it was started."""
        if not self.args.keep_old_actor or self.weight_version is None or self._first_weight_version is None:
            return None
        return max(self._first_weight_version, self.weight_version - 1)

    @endpoint
    async def save(self, rollout_id: int, directory: str) -> None:
        """Data position, buffer, ledger and counters after this rollout, below ``{directory}/rollout``.

        They are pending until the trainer's checkpoint is published and ``commit_save`` is called: see
        ``miles.rollout.manager_state``.

        Raises:
            CannotSave, NotSavable, HookFailed.
        """
        source = self._needed().source
        await self._on_user_loop(manager_state.save(self.args, source, self._counters(), rollout_id, Path(directory)))

    @endpoint
    async def commit_save(self, rollout_id: int, directory: str) -> None:
        """The trainer's checkpoint of this rollout is published: the saved state replaces what was kept before.

        Raises:
            CannotSave: The checkpoint can be continued from nevertheless.
        """
        await asyncio.to_thread(manager_state.commit, rollout_id, Path(directory))

    @endpoint
    async def load(self, rollout_id: int, directory: str) -> bool:
        """Inverse of ``save``, if the checkpoint was published. False: there is no state of this rollout's checkpoint,
        and nothing has changed."""
        source = self._needed().source
        counters = await self._on_user_loop(manager_state.load(self.args, source, rollout_id, Path(directory)))
        if counters is None:
            return False
        self.weight_version = counters.get("weight_version", self.weight_version)
        self._restored_weight_version = counters.get("weight_version") or 0
        return True

    @endpoint
    async def restored_weight_version(self) -> int:
        """The version of the engines' weights that ``load`` found, which versions go on from; 0: it found none."""
        return self._restored_weight_version

    @endpoint(thread="io")
    def progress(self) -> dict[str, Any]:
        """How far the phase under way is. Answers whatever user code does."""
        return self.progress_now.to_plain()

    @endpoint(thread="io")
    def ledger(self) -> str:
        """One line: where the prompt groups are."""
        return self._loaded.source.ledger.describe() if self._loaded is not None else "nothing is loaded yet"

    # -- parts -----------------------------------------------------------------------------------------------

    def set_engines_now(self, targets: list[EngineTarget], router_url: str, api_key: str) -> None:
        """Engines and router, for our code and for ``args`` of user code."""
        engines.set(targets, router_url, api_key, are_restarted=bool(getattr(self.args, "use_fault_tolerance", False)))
        if router_url:
            parts = urlsplit(router_url)
            vars(self.args).update(sglang_router_ip=parts.hostname, sglang_router_port=parts.port)

    def _needed(self) -> Loaded:
        if self._loaded is None:
            raise NotStarted(
                "the rollout manager is not started",
                evidence="start() was not called, or has failed",
                advice="Call start and wait for its answer first.",
            )
        return self._loaded

    async def _on_user_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await self.user.submit(coroutine)

    async def _collect(self, rollout_id: int) -> RolloutFnTrainOutput:
        """The rollout's groups, from the rollout function or from a file; all of them selected in the ledger."""
        loaded = self._needed()
        if self.args.load_debug_rollout_data:
            groups = await asyncio.to_thread(
                debug_data.load_rollout_data,
                self.args.load_debug_rollout_data,
                rollout_id,
                self.args.load_debug_rollout_data_subsample,
            )
            output = RolloutFnTrainOutput(groups, {})
        else:
            self.progress_now.begin("generate", rollout_id, int(self.args.rollout_batch_size))
            output = await self._on_user_loop(self._call(loaded, rollout_id))
        loaded.source.select(output.samples)
        if not loaded.keeps_groups_open:
            loaded.source.drop_unselected("not_returned")
        await asyncio.to_thread(self._dump, rollout_id, output.samples)
        return output

    def _dump(self, rollout_id: int | str, groups: list[Group]) -> None:
        """What ``--save-debug-rollout-data`` and ``--save-debug-trajectory-data`` ask for."""
        if self.args.save_debug_rollout_data:
            debug_data.save_rollout_data(self.args.save_debug_rollout_data, rollout_id, groups, {})
        if self.args.save_debug_trajectory_data:
            save_trajectories(self.args, rollout_id, groups)

    async def _call(self, loaded: Loaded, rollout_id: int) -> RolloutFnTrainOutput:
        hook = loaded.rollout_function
        output = await call_rollout_function(
            hook, RolloutFnTrainInput(rollout_id, self.weight_version, self._oldest_version())
        )
        if not isinstance(output, RolloutFnTrainOutput) or not _are_groups(output.samples):
            raise hook.bad_result(getattr(output, "samples", output), "a list of lists of Sample, not empty")
        need_rewards(self.args, [sample for group in output.samples for sample in flat(group)])
        return output

    async def _rollout_metrics(
        self, rollout_id: int, groups: list[Group], output: RolloutFnTrainOutput, rollout_time: float
    ) -> dict[str, float]:
        extra = output.metrics or {}
        hook = load_hook(self.args.custom_rollout_log_function_path, "--custom-rollout-log-function-path")
        if hook is not None:
            samples = [sample for group in groups for sample in flat(group)]
            if await hook(rollout_id, self.args, samples, extra, rollout_time):
                return take_logged()
        return rollout_metrics(self.args, groups, rollout_time) | numbers_of(extra) | take_logged()

    async def _ship(self, rollout_id: int, groups: list[Group]) -> tuple[list[dict[str, Any]], list[Ref], int]:
        """Train data of the groups, a part for each data-parallel rank, into the store.

        Returns:
            The parts, their references, and how many samples are not trained on.

        What does not fill an optimizer step is not trained on, and ends otherwise in the ledger: a whole group goes
        back to the buffer; one whose other samples are trained on cannot, and is filtered.
        """
        samples = [sample for group in groups for sample in flat(group)]
        if self.args.debug_rollout_only:
            return [], [], 0
        data = await self._on_user_loop(convert(self.args, samples))
        parts = await asyncio.to_thread(split_train_data, self.args, data)
        whole, part = untrained(groups, data, parts)
        refs = await self._put(parts)
        self._refs[rollout_id] = refs
        source = self._needed().source
        source.give_back(whole, "no_full_step")
        source.filtered(part, "partly_trained")
        return parts, refs, len(data["tokens"]) - _num_trained(parts)

    async def _put(self, parts: list[dict[str, Any]]) -> list[Ref]:
        return await store.put_parts_async(parts)

    async def _remove(self, ref: Ref) -> None:
        await store.remove_async(ref)

    async def _remove_left(self, kept: list[Ref]) -> None:
        await store.remove_left_async(kept)

    async def _evaluate(self, loaded: Loaded, rollout_id: int) -> EvalResult:
        hook = loaded.eval_function
        output = await call_rollout_function(hook, RolloutFnEvalInput(rollout_id, weight_version=self.weight_version))
        data = getattr(output, "data", None)
        if not isinstance(data, dict) or not all(isinstance(e, dict) and "rewards" in e for e in data.values()):
            raise hook.bad_result(data, "a dict of data sets, each with rewards, truncated and samples")
        groups = [list(entry.get("samples") or []) for entry in data.values()]
        await asyncio.to_thread(self._dump, f"eval_{rollout_id}", groups)
        extra = output.metrics or {}
        log = load_hook(self.args.custom_eval_rollout_log_function_path, "--custom-eval-rollout-log-function-path")
        if log is not None and await log(rollout_id, self.args, data, extra):
            return EvalResult(take_logged(), eval_examples(data))
        return EvalResult(eval_metrics(self.args, data) | numbers_of(extra) | take_logged(), eval_examples(data))

    def _counters(self) -> dict[str, Any]:
        return {"weight_version": self.weight_version}

    def _new_recovery(self) -> RolloutRecovery:
        return RolloutRecovery(self.args, self._needed().source, Path(self.args.run_dir) / "recovery")

    def _kept_batches(self) -> BatchJournal:
        if self._recovery is None:
            raise NotStarted(
                "the rollout manager keeps no batches",
                evidence="keep() was not called, or has failed",
                advice="Give --use-fault-tolerance.",
            )
        return self._recovery.batches


def _num_trained(parts: list[dict[str, Any]]) -> int:
    return sum(len(rank["partition"]) for rank in parts)


def _num_samples(args: Any, groups: list[Group], parts: list[dict[str, Any]]) -> int:
    """How many are trained on; without a trainer, how many there are."""
    return sum(len(flat(group)) for group in groups) if args.debug_rollout_only else _num_trained(parts)


def _are_groups(groups: Any) -> bool:
    return (
        isinstance(groups, list)
        and bool(groups)
        and all(isinstance(g, list) and g and all(isinstance(s, Sample) for s in flat(g)) for g in groups)
    )
