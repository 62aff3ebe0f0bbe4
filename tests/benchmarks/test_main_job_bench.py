"""The main job's benchmark on made-up figures; neither an engine nor TRL is needed."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from main_job_bench import figures, hooks, our_metrics, ours, peer, report, steps, update
from main_job_bench.figures import OURS, OURS_WIDE, TRL, TRL_WIDE, Iteration, Results, Run, Update
from main_job_bench.processes import RunFailed
from main_job_bench.sizes import QUICK, REFERENCE, Size, answer_lengths, tokens_per_iteration
from main_job_bench.workload import prompt_rows

ROOT = Path(__file__).parents[2]


def test_lengths_are_spread_and_the_same_set_in_each_iteration():
    lengths = answer_lengths(REFERENCE)
    assert len(lengths) == REFERENCE.prompts * REFERENCE.num_rollouts
    iterations = [
        sorted(chain.from_iterable(lengths[first : first + REFERENCE.prompts]))
        for first in range(0, len(lengths), REFERENCE.prompts)
    ]
    assert all(one == iterations[0] for one in iterations)
    assert (iterations[0][0], iterations[0][-1]) == (64, 256)
    assert len(set(iterations[0])) == REFERENCE.samples
    assert sum(iterations[0]) == tokens_per_iteration(REFERENCE)
    assert all(len(set(group)) > 1 for group in lengths)


def test_the_models_have_the_sizes_that_are_asked_for():
    assert (REFERENCE.model.hidden, REFERENCE.model.layers) == (512, 8)
    assert REFERENCE.update_model.num_parameters == pytest.approx(100e6, rel=0.01)


@pytest.mark.parametrize("size", [REFERENCE, QUICK, update.sized(REFERENCE)])
def test_sizes_fit_together_and_survive_json(size):
    assert Size.from_json(json.loads(json.dumps(size.as_json()))) == size
    assert size.samples == size.batch * size.steps
    assert size.batch % size.micro_batch == 0


def test_each_prompt_is_another_one():
    rows = prompt_rows(REFERENCE)
    assert len({row["prompt"] for row in rows}) == len(rows) == REFERENCE.prompts * REFERENCE.num_rollouts
    assert [row["metadata"]["lengths"] for row in rows] == answer_lengths(REFERENCE)


def test_an_answers_length_goes_by_its_place_in_the_group():
    assert [hooks.answer_length({"lengths": [5, 6, 7]}, index) for index in range(9, 13)] == [5, 6, 7, 5]


def test_a_memcpy_takes_time():
    assert hooks.memcpy(1 << 20) > 0


def line(rollout_id, at, **more):
    row = {
        "event": "rollout",
        "rollout_id": rollout_id,
        "time": at,
        "rollout/response_len/mean": 10.0,
        "perf/step_time": 9.0,
        "perf/rollout_time": 4.0,
        "perf/train_time": 3.0,
        "perf/log_probs_time": 1.0,
        "perf/update_weights_time": 0.5,
        "perf/offload_time": 0.25,
    }
    return {**row, **{name.replace("__", "/"): value for name, value in more.items()}}


def test_an_iteration_is_what_passed_since_the_last_one():
    rows = [line(0, 100.0), line(1, 109.0), line(2, 118.5)]
    first, second = our_metrics.iterations(rows, samples=8, warm_up=1)
    assert (first.wall, second.wall) == (9.0, 9.5)
    assert first.parts == {"generation": 4.0, "log_probs": 1.0, "training": 2.0, "update": 0.5, "rest": 1.5}
    assert second.parts["rest"] == 2.0
    assert first.tokens == 80
    assert first.detail["offload"] == 0.25
    assert our_metrics.iterations(rows, samples=8, warm_up=2) == [second]
    assert our_metrics.first_began(rows) == 91.0


def test_evaluations_and_checkpoints_are_taken_out():
    evaluation = {"event": "eval", "rollout_id": 0, "time": 104.0, "perf/eval_time": 4.0}
    rows = [line(0, 100.0), evaluation, line(1, 115.0, perf__save_time=2.0)]
    (found,) = our_metrics.iterations(rows, samples=8, warm_up=1)
    assert found.wall == 9.0
    assert found.parts["rest"] == 1.5
    assert found.apart == {"evaluation": 4.0, "checkpoint": 2.0}


def test_a_line_that_lacks_something_is_told():
    row = line(1, 109.0)
    del row["perf/train_time"]
    with pytest.raises(our_metrics.MetricsMissing, match="rollout 1 has no perf/train_time"):
        our_metrics.iterations([line(0, 100.0), row], samples=8, warm_up=1)
    with pytest.raises(our_metrics.MetricsMissing):
        our_metrics.first_began([])
    with pytest.raises(ValueError, match="no line before it"):
        our_metrics.iterations([], samples=8, warm_up=0)


def test_trl_tells_its_parts_line_by_line():
    parts = {"generation": 3.0, "log_probs": 1.0, "training": 4.0, "reward": 0.25}
    lines = [{"started": 107.0}, *({"wall": 9.0, "samples": 8, "tokens": 80, "parts": parts} for _ in range(3))]
    run = peer.parse("\n".join(map(json.dumps, lines)), TRL, began=100.0, warm_up=1)
    assert (run.column, run.start_up, len(run.iterations)) == (TRL, 7.0, 2)
    assert run.iterations[0].parts == {
        "generation": 3.0, "log_probs": 1.0, "training": 4.0, "update": 0.0, "rest": 1.0,
    }  # fmt: skip
    with pytest.raises(RunFailed):
        peer.parse(json.dumps(lines[0]), TRL, began=100.0, warm_up=1)


def updated(**more):
    clocks = {"gather": 0.125, "copy": 0.25, "engine_copy": 0.5, "wait": 0.1}
    told = {f"perf/update_weights/{name}_time": value for name, value in (clocks | more).items()}
    return {**line(0, 100.0), "perf/update_weights_time": 1.0, **told}


def test_an_update_beside_the_memcpy_before_it():
    _, found = update.updates([updated(), updated(copy=0.375)], [0.2, 0.25], warm_up=0, num_bytes=400)
    assert (found.moving, found.calls, found.times_memcpy) == (1.0, 0.0, 4.0)
    assert found.detail["wait"] == 0.1
    assert len(update.updates([updated(), updated()], [0.2, 0.2], warm_up=1, num_bytes=400)) == 1


@pytest.mark.parametrize(
    ("row", "memcpy", "says"),
    [
        (updated(), [0.1, 0.1], "2 memcpys, but 1 iterations"),
        (updated(copy=None), [0.1], "does not tell copy"),
    ],
)
def test_an_update_that_does_not_add_up_is_told(row, memcpy, says):
    with pytest.raises(RunFailed, match=says):
        update.updates([row], memcpy, warm_up=0, num_bytes=400)


def made_up_run(column, rest):
    parts = {"generation": 4.0, "log_probs": 1.0, "training": 4.0, "update": 1.0 - rest, "rest": rest}
    return Run(column, 12.0, [Iteration(10.0, parts, 32, 5120.0, detail={"offload": 0.3}) for _ in range(4)])


def made_up_results():
    return Results(
        size=REFERENCE.as_json(),
        machine={"cores": "2"},
        versions={"trl": "9.9"},
        threads=2,
        rounds=2,
        runs=[made_up_run(OURS, 0.5), made_up_run(OURS, 0.75), made_up_run(OURS_WIDE, 1.0), made_up_run(TRL, 0.0)],
        updates=[Update(0.6, 0.1, 0.1, 0.1, 0.1, 400 << 20, {"wait": 0.05}) for _ in range(3)],
    )


def test_shares_and_rates():
    run = made_up_run(OURS, 0.5)
    assert run.share("rest") == 0.05
    assert run.mean("generation") == 4.0
    assert (run.samples_per_second, run.tokens_per_second, run.tokens_per_sample) == (3.2, 512.0, 160.0)


def test_the_ratio_is_to_trl_at_its_best():
    results = made_up_results()
    assert figures.samples_ratio(results, OURS_WIDE) == 1.0
    half = Run(TRL_WIDE, 1.0, [Iteration(5.0, {"generation": 5.0}, 32, 5120.0)])
    results.runs.append(half)
    assert figures.samples_ratio(results, OURS_WIDE) == 0.5
    results.runs = [run for run in results.runs if run.column not in (TRL, TRL_WIDE)]
    assert figures.samples_ratio(results, OURS_WIDE) is None


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "reached"), (0.11, "short"), (None, "not measured")])
def test_verdicts(value, verdict):
    assert figures.at_most(value, figures.MAX_REST_SHARE) == verdict


def test_the_tables_of_a_run():
    text = report.markdown(made_up_results())
    assert "| everything else in an iteration (ours, 1 rank, 1 engine) | 6.2 % | 10 % | reached |" in text
    assert "| samples per second against TRL at its best (ours, 2 ranks, 2 engines) | 1.00x | reported | - |" in text
    assert "| weight update: moving the bytes | 3.00x memcpy | 4x memcpy | reached |" in text
    assert "| generation | 4 s (4 s..4 s) | 40.0 % (40.0 %..40.0 %) | 4 s | 40.0 % |" in text
    assert "| `perf/offload_time` | 300 ms | 300 ms |" not in text
    assert "| `perf/offload_time` | 0.3 s | 0.3 s |" in text
    assert "TRL, 1 thread" in text
    assert "400 MiB of float32" in text
    assert "wait 50 ms" in text


def test_what_was_not_measured_has_no_table():
    results = Results(why_missing={"trl": "trl is not installed"}, failures=["TRL, round 1: no"])
    text = report.markdown(results)
    assert "Nothing was measured." in text
    assert "* Not measured: trl: trl is not installed." in text
    assert "* Failed: TRL, round 1: no" in text
    assert "weight update" not in text


def test_results_survive_json():
    results = made_up_results()
    assert Results.from_json(json.loads(json.dumps(results.as_json(), allow_nan=False))) == results


def test_an_earlier_run_adds_what_is_not_there():
    results, earlier = made_up_results(), made_up_results()
    results.runs, results.updates = [made_up_run(OURS, 0.25)], []
    results.add(earlier)
    assert [run.column for run in results.runs] == [OURS, OURS_WIDE, TRL]
    assert len(results.updates) == 3
    assert results.notes == ["From another run: ours_wide, trl, update."]
    earlier.size = QUICK.as_json()
    with pytest.raises(ValueError, match="other sizes"):
        results.add(earlier)


def test_tables_go_between_the_markers():
    document = (ROOT / "docs" / "performance.md").read_text()
    once = report.insert(document, "new")
    assert once != document
    assert report.insert(report.insert(document, "newer"), "new") == once
    with pytest.raises(report.MarkersMissing):
        report.insert("no place", "new")


def test_sides_take_turns_and_each_begins_a_round():
    bench = steps.Bench(QUICK, 2, Results())
    plan = bench.plan(["iteration", "trl", "update"], 4)
    assert [step.name for step in plan[:4]] == [OURS, OURS_WIDE, TRL, TRL_WIDE]
    assert [step.name for step in plan[:-1:4]] == [OURS, OURS_WIDE, TRL, TRL_WIDE]
    assert len(plan) == 17
    assert plan[-1].name == "update"
    assert [step.name for step in bench.plan(["iteration"], 2)] == [OURS, OURS]
    assert bench.plan(["update"], 3) == [steps.Step("update", 0)]
    assert [step.name for step in steps.Bench(QUICK, 1, Results()).plan(["trl"], 1)] == [OURS, TRL]


def test_what_cannot_be_run_is_named():
    assert {steps.why_not(question) for question in steps.QUESTIONS} <= {
        "", "there is no train.py", "trl is not installed", "there is no train.py; trl is not installed",
    }  # fmt: skip


def test_the_jobs_command_line_keeps_the_four_knobs():
    words = ours.flags(REFERENCE, ours.Layout(OURS, 1, 1), Path("/w"), Path("/run"), generate="generate")
    value = {
        flag: words[place + 1] for place, flag in enumerate(words) if flag.startswith("--") and place + 1 < len(words)
    }
    assert int(value["--rollout-batch-size"]) * int(value["--n-samples-per-prompt"]) == int(
        value["--global-batch-size"]
    ) * int(value["--num-steps-per-rollout"])
    assert "--colocate" in words
    assert value["--custom-generate-function-path"] == "main_job_bench.hooks.generate"


def run_benchmark(*flags):
    command = [sys.executable, ROOT / "benchmarks" / "main_job.py", *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


def test_help_names_the_questions():
    shown = run_benchmark("--help")
    assert shown.returncode == 0, shown.stderr
    assert "iteration,trl,update" in shown.stdout


RUNS = """
import sys, os
from pathlib import Path
from main_job_bench.processes import RunFailed, adopt_orphans, environment, python, run, _below

adopt_orphans()
log = Path(sys.argv[1])
env = environment(1)
assert run(python("-c", "print('fine')"), env=env, log_path=log, deadline_s=30) > 0
for program, deadline, says in (
    ("print('sorry'); raise SystemExit(3)", 30, "sorry\\nit ended with exit code 3"),
    ("import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)", 2,
     "not done within 2 s"),
):
    try:
        run(python("-c", program), env=env, log_path=log, deadline_s=deadline)
    except RunFailed as error:
        assert says in str(error), error
    else:
        raise AssertionError(program)
    assert _below() == []
"""


@pytest.mark.full
def test_a_program_that_fails_is_told_and_nothing_of_it_is_left(tmp_path):
    """In a process of its own: whatever is left below it is killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUNS, tmp_path / "log"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
