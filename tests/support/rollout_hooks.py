"""User code for rollout tests, in all the forms that there are."""

# ruff: noqa: A002 - the parameter name that tells the forms apart
from __future__ import annotations

import asyncio
import copy
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from miles.rollout.base_types import GenerateFnOutput, RolloutFnTrainOutput
from miles.rollout.data_source import DataSource
from miles.rollout.sglang_rollout import GenerateState, generate
from miles.utils.http_utils import post
from miles.utils.types import Sample

threads: dict[str, str] = {}
"""On which thread each function ran last."""
release = threading.Event()


def _ran(name):
    threads[name] = threading.current_thread().name


async def async_rm(args, sample, **kwargs):
    _ran("async_rm")
    return 0.25


def sync_rm(args, sample, **kwargs):
    _ran("sync_rm")
    return 0.5


async def group_rm(args, samples, **kwargs):
    return [float(i) for i, _ in enumerate(samples)]


async def short_group_rm(args, samples, **kwargs):
    return [1.0]


async def dict_rm(args, sample, **kwargs):
    return {"score": 1.0, "pred": "x"}


async def failing_rm(args, sample, **kwargs):
    return helper_that_raises(sample)


def helper_that_raises(sample):
    raise KeyError("the user's own mistake")


async def none_rm(args, sample, **kwargs):
    return None


async def blocking_rm(args, sample, **kwargs):
    release.wait(30.0)  # a mistake that users make: this blocks the loop
    return 1.0


async def busy_rm(args, sample, **kwargs):
    while not release.is_set():
        sum(range(1000))
    return 1.0


def slow_sync_rm(args, sample, **kwargs):
    time.sleep(0.05)
    return 1.0


async def new_generate(input):
    """The new form, posting to the router by itself."""
    _ran("new_generate")
    state, sample = input.state, input.sample
    ids = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    url = f"http://{input.args.sglang_router_ip}:{input.args.sglang_router_port}/generate"
    output = await post(url, {"input_ids": ids, "sampling_params": input.sampling_params, "return_logprob": True})
    made = [entry[1] for entry in output["meta_info"]["output_token_logprobs"]]
    sample.tokens, sample.response, sample.response_length = ids + made, output["text"], len(made)
    sample.rollout_log_probs = [entry[0] for entry in output["meta_info"]["output_token_logprobs"]]
    sample.update_from_meta_info(input.args, output["meta_info"])
    return GenerateFnOutput(samples=sample)


class ClassGenerate:
    async def __call__(self, input):
        return await new_generate(input)


async def legacy_generate(args, sample, sampling_params):
    _ran("legacy_generate")
    assert not GenerateState(args).aborted
    return await generate(args, sample, sampling_params)


async def legacy_generate_with_evaluation(args, sample, sampling_params, evaluation=False):
    sample.metadata["evaluation"] = evaluation
    return await generate(args, sample, sampling_params)


def sync_generate(args, sample, sampling_params):
    _ran("sync_generate")
    sample.tokens, sample.response, sample.response_length = [1, 2, 3], "two", 2
    sample.rollout_log_probs = [-1.0, -1.0]
    sample.status = Sample.Status.COMPLETED
    return sample


async def two_samples(input):
    """One execution that makes two samples."""
    made = []
    for part in range(2):
        sample = Sample(
            **{k: v for k, v in vars(input.sample).items() if k in ("group_index", "index", "prompt", "label")}
        )
        sample.rollout_id = input.sample.index
        sample.index = 1000 + 2 * input.sample.index + part
        sample.tokens, sample.response, sample.response_length = [1, 2, 3], "\\boxed{1}", 2
        sample.rollout_log_probs = [-1.0, -1.0]
        sample.status = Sample.Status.COMPLETED
        made.append(sample)
    return made


async def own_executions(input):
    """Groups 1 and 2 make a third execution each: two samples with ids of their own."""
    sample = input.sample
    if sample.group_index not in (1, 2) or sample.index % 2:
        return _with_id(sample, 100 + sample.index)
    return [_with_id(copy.deepcopy(sample), 100 * i + sample.index) for i in (1, 2)]


def _with_id(sample, rollout_id):
    sample.rollout_id = rollout_id
    sample.tokens, sample.response, sample.response_length = [1, 2, 3], "\\boxed{1}", 2
    sample.rollout_log_probs = [-1.0, -1.0]
    sample.status = Sample.Status.COMPLETED
    return sample


async def doubled(input):
    """Some executions make two samples, which share the number of the one that was asked for."""
    sample = _with_id(input.sample, None)
    return [sample, copy.deepcopy(sample)] if sample.group_index in (1, 2) else sample


async def made_at_once(input):
    return _with_id(input.sample, None)


async def bad_generate(input):
    return "a text"


class ClassRollout:
    def __init__(self, input):
        self.args, self.source = input.args, input.data_source

    async def __call__(self, input):
        _ran("ClassRollout")
        return RolloutFnTrainOutput(_finished(self.source.get_samples(self.args.rollout_batch_size)), {"mine": 3})


class SyncClassRollout(ClassRollout):
    def __call__(self, input):
        _ran("SyncClassRollout")
        return _finished(self.source.get_samples(self.args.rollout_batch_size))


def function_rollout(args, rollout_id, data_source, evaluation=False):
    _ran("function_rollout")
    if evaluation:
        return {"mine": {"rewards": [1, 0], "truncated": [False, False], "samples": []}}
    return _finished(data_source.get_samples(args.rollout_batch_size))


def wasteful_rollout(args, rollout_id, data_source, evaluation=False):
    """Takes twice what it gives."""
    return _finished(data_source.get_samples(2 * args.rollout_batch_size))[: args.rollout_batch_size]


def bad_rollout(args, rollout_id, data_source, evaluation=False):
    return []


def _finished(groups):
    for group in groups:
        for sample in group:
            sample.tokens, sample.response_length, sample.response = [5, 6, 7], 2, "ok"
            sample.reward, sample.status = float(sample.index % 2), Sample.Status.COMPLETED
    return groups


def keep_even(args, samples, **kwargs):
    _ran("keep_even")
    return samples[0].group_index % 2 == 0


def keep_none(args, samples, **kwargs):
    return False


def keep_first(args, samples, **kwargs):
    return samples[0].group_index == 0


def failing_filter(args, samples, **kwargs):
    raise ValueError("no filter today")


def remove_first(args, data):
    data[0][0].remove_sample = True


all_samples_seen = []


def see_all_samples(args, all_samples, data_source):
    all_samples_seen[:] = all_samples
    assert isinstance(data_source, DataSource)


def ten_times(args, samples):
    return [s.reward for s in samples], [10.0 * s.reward for s in samples]


def own_conversion(args, samples):
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [7.0 for s in samples],
    }


def half_conversion_without_indices(args, samples):
    return own_conversion(args, samples[::2])


def half_conversion(args, samples):
    return {**own_conversion(args, samples[::2]), "sample_indices": [s.index for s in samples[::2]]}


def log_nothing(rollout_id, args, samples, extra, rollout_time):
    return True


class OwnSource(DataSource):
    """Gives no numbers, keeps no buffer."""

    def __init__(self, args):
        self.args, self.given = args, 0

    def get_samples(self, num_samples):
        groups = []
        for _ in range(num_samples):
            groups.append([Sample(prompt="1+1=", label="2") for _ in range(self.args.n_samples_per_prompt)])
        self.given += num_samples
        return groups

    def add_samples(self, samples):
        raise NotImplementedError

    def save(self, rollout_id):
        pass

    def load(self, rollout_id=None):
        pass


class FailingSource(OwnSource):
    def __init__(self, args):
        raise OSError("my database is down")


def newest_first(args, rollout_id, buffer, num_samples):
    taken = buffer[-num_samples:][::-1]
    del buffer[-num_samples:]
    return taken


def drop_all_but_one(args, rollout_id, buffer, num_samples):
    taken = buffer[:1]
    buffer.clear()
    return taken


async def leaving_rm(args, sample, **kwargs):
    raise SystemExit(3)


async def cancelled_rm(args, sample, **kwargs):
    raise asyncio.CancelledError


async def careless_rm(args, sample, **kwargs):
    """Starts a task that wants to end the process, and does not look at it."""
    task = asyncio.ensure_future(leaving_rm(args, sample))
    await asyncio.wait({task}, timeout=0.2)
    return 1.0


# -- user code that wants to end its process ------------------------------------------------------------------


class Leaving:
    """A data source, or rollout class, that leaves in the method that is named; else it works."""

    where = ""

    def __init__(self, input):
        self.args = getattr(input, "args", input)
        self.leave("__init__")

    def leave(self, where):
        if self.where == where:
            raise SystemExit(3)

    def __call__(self, input):
        self.leave("__call__")

    def get_samples(self, num_samples):
        self.leave("get_samples")
        return [[Sample(prompt="1+1=", label="2") for _ in range(self.args.n_samples_per_prompt)]
                for _ in range(num_samples)]  # fmt: skip

    def add_samples(self, samples):
        self.leave("add_samples")

    def save(self, rollout_id):
        self.leave("save")

    def load(self, rollout_id=None):
        self.leave("load")

    def get_buffer_length(self):
        return None


class LeavesAtOnce(Leaving):
    where = "__init__"


class LeavesWhenCalled(Leaving):
    where = "__call__"


class LeavesWhenAsked(Leaving):
    where = "get_samples"


class LeavesWhenGiven(Leaving):
    where = "add_samples"


class LeavesWhenSaved(Leaving):
    where = "save"


def leaves(*args, **kwargs):
    raise SystemExit(3)


class GivesNoGroups(Leaving):
    def get_samples(self, num_samples):
        return [Sample() for _ in range(num_samples)]


class NotCallable:
    def __init__(self, input):
        pass


async def large_rm(args, sample, **kwargs):
    return len(bytearray(1 << 62))


def naughty_rm(args, sample, **kwargs):
    """Prints, leaves a thread and a process behind, in a session of its own."""
    sys.stdout.write("the user's own line\n")
    threading.Thread(target=threading.Event().wait, name="left-behind").start()
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(args.user_file).write_text(str(process.pid))
    return 1.0


async def slow_to_wake_rm(args, sample, **kwargs):
    """Blocks the loop until a file is there."""
    if sample.index == 0:
        _wait_for_file(args.user_file)
    return 1.0


def _wait_for_file(path):
    Path(path).write_text("blocked")
    deadline = time.monotonic() + 30
    while not Path(path + ".go").exists() and time.monotonic() < deadline:
        pass


async def killing_rm(args, sample, **kwargs):
    sys.stdout.write("about to leave\n")
    sys.stdout.flush()
    os._exit(7)


def changing_rm(args, sample, **kwargs):
    args.rollout_temperature = 0.25
    args.mine = [sample.index]
    return args.rollout_temperature


def new_by_name(input, more=1, others=2):
    return _with_id(input.sample, None)


async def reads_flag(args, sample, **kwargs):
    return float(args.user_weight)


class FlaggedGenerate:
    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--user-weight", type=float, default=0.5)

    async def __call__(self, input):
        return _with_id(input.sample, None)
