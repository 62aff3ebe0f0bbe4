"""The GPU benchmark on made-up findings: what samples of memory mean, its table, and which stages run."""

import importlib
import inspect
import json
import random
from pathlib import Path

import pytest
import torch
from support.tiny_models import tensor_shapes

from gpu_bench import zygote
from gpu_bench.collective import freed
from gpu_bench.compare import apart, weights_apart
from gpu_bench.memory import ENGINE, TRAINER, Sample, Span, by_iteration, creep, gap_between, read_spans, released
from gpu_bench.model import SHAPES, moe_shapes
from gpu_bench.recorded import samples_of
from gpu_bench.rehearsal import VARIABLE, shape
from gpu_bench.results import Results, read_rows, table_of
from gpu_bench.runs import visible
from gpu_bench.stages import ONLY_ON_GPUS, STAGES, chosen, lanes, left_out
from gpu_bench.strikes import strike_answer
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


def test_stages_that_need_more_gpus_are_left_out_and_it_is_told():
    assert "broadcast" not in chosen([], 1) and "broadcast" in chosen([], 2)
    assert chosen(["layouts"], 1) == []
    assert chosen(["foreign", "ipc"], 1) == ["ipc", "foreign"]  # in their own order
    with pytest.raises(ValueError, match="no stage is called icp"):
        chosen(["icp"], 1)
    assert all(stage.deadline_s <= 600 for stage in STAGES.values())
    assert left_out(["layouts", "moe"], 1) == {"layouts": "needs 2 GPUs, there are 1"}
    assert left_out(["layouts", "ipc"], 2, rehearsal=True) == {"ipc": "needs a GPU"}
    assert left_out(["layouts", "ipc"], 2) == {}


def test_stages_that_measure_no_speed_share_out_the_gpus():
    names = ["ipc", "killed-memory", "moe", "disk", "resume", "layouts"]
    assert lanes(names, 2) == [["killed-memory", "disk"], ["moe", "resume"]]
    assert lanes(names, 1) == lanes(["moe", "ipc"], 2) == []
    assert visible((1,), None) == visible((1,), "") == "1"
    assert visible((0,), "3,GPU-a") == "3" and visible((0, 1), "3,GPU-a") == "3,GPU-a"


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ONLY_ON_GPUS])
def test_each_stage_has_its_function(name):
    stage = STAGES[name]
    function = getattr(importlib.import_module(f"gpu_bench.{stage.module}"), stage.function)
    inspect.signature(function).bind(Results(Path(), name), *stage.all_arguments(4))


def test_metrics_are_compared_as_shares_and_losses_as_they_are():
    theirs = [{"train/grad_norm": 2.0, "train/loss": 0.0}, {"train/grad_norm": 4.0, "train/loss": 1e-5}]
    ours = [{"train/grad_norm": 2.2, "train/loss": 0.0}, {"train/grad_norm": 3.0, "train/loss": 3e-5}]
    assert apart(ours, theirs, "train/grad_norm") == pytest.approx((0.05, 0.25))
    assert apart(ours, theirs, "train/loss") == pytest.approx((0.0, 2e-5))
    assert apart(ours[:1], theirs, "train/loss") is None and apart([], [], "train/loss") is None
    assert apart(ours, theirs, "rollout/log_probs") is None
    broken = [{"train/loss": 0.0}, {"train/loss": float("nan")}]
    assert apart(broken, theirs, "train/loss") == (0.0, float("inf"))


def test_weights_are_compared_with_how_far_they_moved():
    first = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.5])}
    ours = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.5])}
    size = (9 + 4.5**2) ** 0.5
    assert weights_apart(ours.items(), theirs, first) == pytest.approx((0.5 / size, 0.5 / size))
    assert weights_apart(theirs.items(), theirs, first)[0] == 0
    with pytest.raises(KeyError):
        weights_apart([("c", torch.ones(1))], theirs, first)


def test_a_dead_group_frees_each_gpu_by_process():
    samples = [Sample(1, 0, {1: 5}), Sample(3, 0, {1: 5, 9: 1}), Sample(4, 0, {9: 1})]
    assert freed(samples, (1, 2), 2.0) == {1: 2.0}  # the other rank has never been here
    assert freed(samples[:2], (1, 2), 2.0) == {1: float("inf")}


def test_an_engine_is_struck_while_it_generates_the_last_rollout(monkeypatch):
    assert strike_answer() == 3 * 128 + 32 + 2
    monkeypatch.setenv(VARIABLE, "1")
    assert shape("moe") == "tiny-moe" and shape("layers8") == "tiny"
    assert strike_answer() == 3 * 16 + 4 + 2


def test_made_up_rollouts_have_whole_groups_and_tokens_of_the_vocabulary():
    samples = samples_of(random.Random(0), 2, 50, (3, 4, 16))
    assert [sample.group_index for sample in samples] == [6] * 4 + [7] * 4 + [8] * 4
    assert [sample.index for sample in samples] == list(range(24, 36))
    for sample in samples:
        assert 8 <= sample.response_length == len(sample.rollout_log_probs) <= 16 < len(sample.tokens)
        assert all(0 <= token < 50 for token in sample.tokens)
    assert len({sample.reward for sample in samples}) == 12
    tokens = {t for sample in samples_of(random.Random(0), 0, 258, (30, 4, 64)) for t in sample.tokens}
    assert tokens == set(range(258)) - {256}  # the padding's row is zero


def test_a_model_with_experts_has_the_names_that_published_ones_have():
    shapes = SHAPES["tiny-moe"]
    found = dict(moe_shapes(shapes))
    assert found["model.layers.1.mlp.experts.3.down_proj.weight"] == (64, 48)
    assert found["model.layers.0.mlp.gate.weight"] == (4, 64) and found["lm_head.weight"] == (320, 64)
    config = shapes.config()
    assert found.keys() == dict(tensor_shapes(config)).keys()
    assert config["tie_word_embeddings"] is False and config["model_type"] == "qwen3_moe"


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
    made = SHAPES["0.6B"]
    attention = 2 * made.hidden * (made.heads + made.kv_heads) * made.head_dim + 2 * made.head_dim
    layer = attention + 3 * made.hidden * made.ffn + 2 * made.hidden
    assert 2 * (made.vocab * made.hidden + made.layers * layer + made.hidden) == 1_192_099_840
    assert json.loads(json.dumps(made.config()))["tie_word_embeddings"] is True
