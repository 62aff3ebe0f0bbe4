"""Traces and memory recordings of a real rank, read back."""

import gzip
import json

import pytest
import torch
from support.ranks import RanksFailed, run_ranks
from support.rollout_steps import args_of, train, trained, trainer_of
from support.tiny_models import tiny_model

from miles.backends.training_utils.profiling import CannotProfile, MemoryRecorder, NoMemoryRecorder, StepProfiler

pytestmark = pytest.mark.full
every_backend = pytest.mark.parametrize("kind", ["megatron", "fsdp"])
PROFILED = {"use_pytorch_profiler": True, "profile_step_start": 1, "profile_step_end": 2}


def events(path):
    """Events of a trace by name; their begin and end in microseconds."""
    found = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@every_backend
def test_a_trace_shows_a_rollouts_phases_and_operators(tmp_path, kind):
    flags = {**PROFILED, "tensorboard_dir": str(tmp_path / "traces"), "use_kl_loss": True}
    run_ranks(2, trained, kind, tiny_model("qwen3"), flags, 3)
    assert names(tmp_path / "traces") == ["train_overall-step00001-rank00000.pt.trace.json.gz"]
    found = events(tmp_path / "traces" / "train_overall-step00001-rank00000.pt.trace.json.gz")
    ((begin, end),) = found["train"]
    for phase in ("data_preprocess", "ref_log_probs", "log_probs", "actor_train"):
        ((phase_begin, phase_end),) = found[phase]
        assert begin <= phase_begin < phase_end <= end, phase
    assert found["actor_train"][0][0] >= found["log_probs"][0][1]
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= set(found)
    assert any("all_reduce" in name or "reduce_scatter" in name for name in found), "collectives of the step"
    assert any("Backward" in name for name in found)


@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [
        ("train_actor", "MmBackward0", "log_probs"),
        ("train_log_probs", "aten::scaled_dot_product_attention", "MmBackward0"),
    ],
)
def test_a_part_can_be_traced_alone_on_the_ranks_that_are_asked_for(tmp_path, target, has, lacks):
    flags = {**PROFILED, "tensorboard_dir": str(tmp_path), "profile_target": [target], "profile_ranks": [1]}
    run_ranks(2, trained, "fsdp", tiny_model("qwen3"), {**flags, "global_batch_size": 4}, 2)
    assert names(tmp_path) == [f"{target}-step00001-rank00001.pt.trace.json.gz"]
    found = events(tmp_path / f"{target}-step00001-rank00001.pt.trace.json.gz")
    assert has in found
    assert lacks not in found


def test_traces_lie_in_the_runs_directory_unless_told(tmp_path):
    flags = {**PROFILED, "run_dir": str(tmp_path), "profile_step_start": 0, "profile_step_end": 1}
    run_ranks(1, trained, "fsdp", tiny_model("qwen3"), {**flags, "profile_target": ["train_actor", "train_log_probs"]})
    assert names(tmp_path / "traces") == [
        f"{target}-step00000-rank00000.pt.trace.json.gz" for target in ("train_actor", "train_log_probs")
    ]


def test_a_target_within_another_is_part_of_its_trace(tmp_path):
    args = args_of("fsdp", tiny_model("qwen3"), use_pytorch_profiler=True, profile_step_start=0, profile_step_end=1)
    vars(args).update(tensorboard_dir=str(tmp_path), profile_target=["train_overall", "train_actor"])
    profiler = StepProfiler(args, 0)
    with profiler.step("train_overall"), profiler.step("train_actor"):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert names(tmp_path) == ["train_overall-step00000-rank00000.pt.trace.json.gz"]


def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    args = args_of("fsdp", tiny_model("qwen3"), use_pytorch_profiler=True, tensorboard_dir=str(tmp_path / "file"))
    with pytest.raises(CannotProfile, match="--tensorboard-dir"):
        StepProfiler(args, 0)


RECORDED = {"record_memory_history": True, "memory_recorder": "memray"}


def test_a_memory_recording_says_who_allocates(tmp_path):
    """Until as many rollouts are trained as was asked for."""
    from memray import FileReader

    flags = {**RECORDED, "run_dir": str(tmp_path), "memory_snapshot_dir": "memory", "memory_snapshot_num_steps": 1}
    sizes = run_ranks(1, _recorded, tiny_model("qwen3", hidden=64), flags)[0]
    path = tmp_path / "memory" / "rank00000-snapshot.memray"
    assert names(tmp_path / "memory") == [path.name]
    assert sizes[0] == sizes[1] == path.stat().st_size > 0
    with FileReader(path) as reader:
        assert reader.metadata.peak_memory > 64 * 64 * 4
        files = {
            frame[1]
            for record in reader.get_high_watermark_allocation_records(merge_threads=True)
            for frame in record.stack_trace(max_stacks=50)
        }
    assert any(file.endswith("fsdp_utils/backend.py") for file in files)


def _recorded(path, flags):
    from pathlib import Path

    recorder = MemoryRecorder(args_of("fsdp", path, **flags), 0)
    trainer = trainer_of("fsdp", path)
    file = Path(flags["run_dir"]) / "memory" / "rank00000-snapshot.memray"
    sizes = []
    for number in range(2):
        train(trainer, number)
        recorder.rollout_done()
        sizes.append(file.stat().st_size)
    recorder.close()
    trainer.backend.close()
    return sizes


def test_a_memory_recording_until_the_end_has_the_name_that_was_asked_for(tmp_path):
    """--memory-snapshot-path, and no --memory-snapshot-num-steps."""
    flags = {**RECORDED, "memory_snapshot_dir": str(tmp_path), "memory_snapshot_path": "mine.bin"}
    run_ranks(1, _record_until_closed, tiny_model("qwen3"), flags)
    assert names(tmp_path) == ["rank00000-mine.memray"]


def _record_until_closed(path, flags):
    recorder = MemoryRecorder(args_of("fsdp", path, **flags), 0)
    recorder.rollout_done()
    recorder.close()
    recorder.close()


class Cudart:
    """Stands where a GPU's runtime would be: what nsys follows."""

    def __init__(self):
        self.calls = []

    def cudaProfilerStart(self):
        self.calls.append("start")

    def cudaProfilerStop(self):
        self.calls.append("stop")


def test_nsys_is_told_of_the_steps_that_it_records():
    """--profile, of which a machine without a GPU can show when it begins and ends only."""
    args = args_of("fsdp", tiny_model("qwen3"), profile=True, profile_step_start=1, profile_step_end=3)
    runtime = Cudart()
    profiler = StepProfiler(args, 0, cudart=lambda: runtime, with_ranges=False)
    seen = []
    for number in range(4):
        with profiler.step("train_overall"):
            seen.append((number, len(runtime.calls)))
    assert runtime.calls == ["start", "stop"] * 2
    assert seen == [(0, 0), (1, 1), (2, 3), (3, 4)]


def test_torchs_recorder_needs_a_gpu():
    with pytest.raises(NoMemoryRecorder, match="--memory-recorder memray"):
        MemoryRecorder(args_of("fsdp", tiny_model("qwen3"), record_memory_history=True, memory_recorder="torch"), 0)


def test_without_memray_it_is_told_what_to_install(tmp_path):
    with pytest.raises(RanksFailed, match=r"pip install 'miles\[profiling\]'"):
        run_ranks(1, _without_memray, tiny_model("qwen3"), str(tmp_path))


def _without_memray(path, directory):
    import sys

    sys.modules["memray"] = None
    MemoryRecorder(args_of("fsdp", path, **RECORDED, run_dir=directory), 0)
