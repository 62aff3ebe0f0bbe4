"""NCCL updates from and into several ranks, as the GPU benchmark arranges them: which GPUs, what is checked, in which
order, and what results say."""

import contextlib

import pytest

from gpu_bench.placing import VARIABLE, Placing, is_shared, may_share
from gpu_bench.results import Results, read_rows
from gpu_bench.stages import chosen, left_out
from gpu_bench.tensor_parallel import Means, nccl_tp2
from main_job_bench.processes import RunFailed


def test_ranks_that_may_share_gpus_need_fewer():
    assert chosen(["nccl-tp2"], 3) == [] and chosen(["nccl-tp2"], 4) == ["nccl-tp2"]
    why = "needs 4 GPUs, or 2 with NCCL_MULTI_RANK_GPU_ENABLE=1, there are 3"
    assert left_out(["nccl-tp2"], 3) == {"nccl-tp2": why}
    both = ["nccl-tp2", "broadcast-tp2"]
    assert chosen(both, 2, may_share=True) == ["nccl-tp2"]
    assert left_out(both, 2, may_share=True) == {"broadcast-tp2": "needs 4 GPUs, there are 2"}
    assert left_out(["nccl-tp2"], 1, may_share=True) == {"nccl-tp2": "needs 4 GPUs, there are 1"}
    assert not may_share({}) and not may_share({VARIABLE: "0"}) and may_share({VARIABLE: "1"})


def test_ranks_share_gpus_only_where_there_are_too_few():
    separate = Placing(4)
    assert [separate.engine(ranks) for ranks in (1, 2)] == [(3,), (2, 3)]
    assert [separate.bare(ranks) for ranks in (1, 2)] == [(0, 1), (0, 1, 2)]
    assert not separate.is_shared and separate.note == ""
    for shared in (Placing(2), Placing(3)):
        assert [shared.engine(ranks) for ranks in (1, 2)] == [(1,), (0, 1)]
        assert [shared.bare(ranks) for ranks in (1, 2)] == [(0, 1), (0, 0, 1)]
        assert shared.is_shared and shared.note == ", several ranks on a GPU"
    assert is_shared(Placing(2).bare(2)) and not is_shared(Placing(2).bare(1)) and not is_shared(separate.bare(2))


class ScriptedEngine:
    def __init__(self, name):
        self.name, self.url = name, "http://nowhere"

    async def has_bracket(self):
        return False


class ScriptedUpdates:
    """Engines, trainers and broadcasts of ``nccl-tp2`` without any: ``fails`` holds names of those that fail."""

    def __init__(self, out, fails=()):
        (out / "model-0.6B").mkdir()
        (out / "model-0.6B" / "tokenizer.json").touch()  # it has been made
        self.calls, self.fails = [], fails
        self.means = Means(self.engine, self.updates_of, self.compare_with, self.bare_seconds)

    def call(self, name, *facts):
        self.calls.append((name, *facts))
        if name in self.fails:
            raise RunFailed(f"{name} is no good")

    @contextlib.asynccontextmanager
    async def engine(self, out, path, name, *, gpus, dummy, max_tokens):
        self.call(name, gpus, dummy)
        yield ScriptedEngine(name)

    def updates_of(self, out, name, task, ranks, deadline_s):
        self.call(name, task.version, bool(task.export))
        seconds = dict.fromkeys(
            ("total", "connect", "gather", "copy", "wait", "engine", "engine_copy", "num_buckets"), 0.5
        )
        return [{"bucket": bucket, "num_bytes": 10**9, "seconds": [seconds]} for bucket in task.buckets]

    async def compare_with(self, results, client, export, version, prefix):
        self.call(f"checked {client.name}", version, export.name)

    def bare_seconds(self, results, shape, group):
        self.call("bare", shape, group)
        return 0.25


def test_weights_that_come_from_and_go_to_several_ranks_are_checked_before_speed_is_measured(tmp_path):
    script = ScriptedUpdates(tmp_path)
    nccl_tp2(Results(tmp_path, "nccl-tp2"), 4, script.means)
    assert script.calls[:8] == [
        ("nccl-0.6B-to-2", (2, 3), False),
        ("nccl-0.6B-to-1", (3,), False),
        ("nccl-0.6B-1-to-2", 1, True),
        ("checked nccl-0.6B-to-2", 11, "export-nccl-0.6B-1-to-2"),
        ("nccl-0.6B-2-to-2", 13, True),
        ("checked nccl-0.6B-to-2", 23, "export-nccl-0.6B-2-to-2"),
        ("nccl-0.6B-2-to-1", 1, True),
        ("checked nccl-0.6B-to-1", 11, "export-nccl-0.6B-2-to-1"),
    ]
    assert script.calls[8:] == [
        ("bare", "8B", (0, 1, 2)),
        ("bare", "8B", (0, 1)),
        ("nccl-8B-to-2", (2, 3), True),
        ("nccl-8B-to-1", (3,), True),
        ("nccl-8B-1-to-2", 1, False),
        ("nccl-8B-2-to-2", 23, False),
        ("nccl-8B-2-to-1", 1, False),
    ]
    rows = read_rows(tmp_path)
    assert not any("several ranks" in row.name for row in rows)
    assert "8B, TP 2 to TP 1, buckets of 1024 MiB" in {row.name for row in rows}


def test_what_was_measured_with_several_ranks_on_a_gpu_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # else the stage's own would stay
    script = ScriptedUpdates(tmp_path, ("bare", "nccl-0.6B-2-to-2"))
    with pytest.raises(ExceptionGroup) as caught:
        nccl_tp2(Results(tmp_path, "nccl-tp2"), 2, script.means)
    assert len(caught.value.exceptions) == 3
    assert ("nccl-0.6B-to-2", (0, 1), False) in script.calls and ("bare", "0.6B", (0, 0, 1)) in script.calls
    assert script.calls[-1] == ("checked nccl-0.6B-to-1", 11, "export-nccl-0.6B-2-to-1")
    rows = {row.name: row for row in read_rows(tmp_path)}
    assert rows.pop("8B").value == "left out"
    assert rows["0.6B: into an engine of TP 2, several ranks on a GPU"].value == "failed"
    assert all("several ranks on a GPU" in name for name in rows)
