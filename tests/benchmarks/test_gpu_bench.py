"""The GPU benchmark on made-up findings: what samples of memory mean, its table, and which stages run."""

import json

import pytest

from gpu_bench import zygote
from gpu_bench.memory import ENGINE, TRAINER, Sample, Span, by_iteration, creep, gap_between, read_spans, released
from gpu_bench.model import SHAPES
from gpu_bench.results import Results, read_rows, table_of
from gpu_bench.stages import STAGES, chosen
from gpu_bench.training import checksums_said, told
from miles.tracking.trace import LOOP, TraceFile
from miles.tracking.trace import TRAINER as TRAINER_TRACK

ROLES = {1: ENGINE, 2: TRAINER, 3: TRAINER}
SPANS = [
    Span("rollout", 0.0, 10.0, 0),
    Span("offload", 10.0, 12.0, 0),
    Span("train", 12.0, 20.0, 0),
    Span("rollout", 30.0, 40.0, 1),
    Span("train", 42.0, 50.0, 1),
]


def sample(at, engine, trainer):
    return Sample(at, engine + trainer + 1, {1: engine, 2: trainer})


def test_memory_is_told_by_role_and_phase_of_each_iteration():
    samples = [
        sample(5, 70, 2),
        sample(6, 90, 2),
        sample(7, 80, 2),
        sample(11, 1, 2),
        sample(15, 1, 30),
        sample(35, 81, 3),
    ]
    assert by_iteration(samples, ROLES, SPANS, "rollout", ENGINE) == {0: 80, 1: 81}
    assert by_iteration(samples, ROLES, SPANS, "rollout", TRAINER) == {0: 2, 1: 3}
    assert by_iteration(samples, ROLES, SPANS, "train", "total") == {0: 32}
    assert released(samples, SPANS) == {0: 4}


def test_what_grows_is_counted_after_the_first_iteration():
    assert creep({0: 5, 2: 9, 1: 7}) == 2
    assert creep({0: 5, 1: 7}) == 0 and creep({}) == 0


def test_a_successor_that_comes_before_the_memory_is_back_shows():
    samples = [sample(1, 80, 30), Sample(3, 0, {1: 80}), Sample(6, 0, {1: 80, 3: 5})]
    assert gap_between(samples, ROLES, 2, 2.0) == (1.0, 4.0)
    early = [sample(1, 80, 30), Sample(3, 0, {1: 80, 2: 30, 3: 5}), Sample(6, 0, {1: 80, 3: 5})]
    assert gap_between(early, ROLES, 2, 2.0) == (4.0, 1.0)
    assert gap_between([sample(1, 80, 30)], ROLES, 2, 2.0) == (float("inf"), float("inf"))


def test_spans_are_those_of_the_controllers_loop(tmp_path):
    trace = TraceFile(tmp_path)
    trace.add(LOOP, [("offload", 1.0, 2.0, {}), ("train", 2.0, 5.5, {"rollout_id": 3})])
    trace.add(TRAINER_TRACK, [("train", 2.5, 5.0, {})])
    trace.close()
    assert read_spans(trace.path) == [Span("offload", 1.0, 2.0, -1), Span("train", 2.0, 5.5, 3)]


def test_findings_are_kept_at_once_and_the_last_one_counts(tmp_path):
    first = Results(tmp_path, "ipc")
    first.add("stage", "failed", note="no memory")
    told(first, "engine", {0: 10, 1: 40, 2: 60}, 1000)
    Results(tmp_path, "ipc").add("stage", "done")
    rows = read_rows(tmp_path)
    assert [(row.name, row.value) for row in rows] == [("stage", "done"), ("engine", 6e-8)]
    assert rows[1].note == "1.00 to 6.00 % of the GPU over 3 iterations; last minus second: +2.000 %"
    assert "| ipc | stage | done |" in table_of(rows)


def test_stages_that_need_more_gpus_are_left_out():
    assert "broadcast" not in chosen([], 1) and "broadcast" in chosen([], 2)
    assert chosen(["layouts"], 1) == []
    assert chosen(["foreign", "ipc"], 1) == ["ipc", "foreign"]  # in their own order
    with pytest.raises(ValueError, match="no stage is called icp"):
        chosen(["icp"], 1)
    assert all(stage.deadline_s <= 600 for stage in STAGES.values())


def test_a_fork_is_only_well_if_every_child_computes_right():
    well = {"sum": zygote.EXPECTED, "seconds": 0.5}
    assert zygote.verdict({"children": [well, well], "why_unsafe": ""}) == "forks use CUDA; the check says: safe"
    bad = {"error": "RuntimeError: Cannot re-initialize CUDA", "seconds": 0.1}
    assert "cannot use CUDA: RuntimeError" in zygote.verdict({"children": [well, bad], "why_unsafe": ""})
    assert "a wrong sum" in zygote.verdict({"children": [{"sum": 1.0}], "why_unsafe": ""})


def test_checksums_are_read_from_a_runs_log(tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "controller.log"
    log.write_text(
        "x INFO engine-0 holds weight version 3, checksum ab12\ny\nx engine-0 holds weight version 4, checksum cd"
    )
    assert checksums_said(tmp_path) == {3: "ab12", 4: "cd"}


def test_the_model_has_the_shape_of_the_published_one():
    shape = SHAPES["0.6B"]
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim + 2 * shape.head_dim
    layer = attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden
    assert 2 * (shape.vocab * shape.hidden + shape.layers * layer + shape.hidden) == 1_192_099_840
    assert json.loads(json.dumps(shape.config()))["tie_word_embeddings"] is True
