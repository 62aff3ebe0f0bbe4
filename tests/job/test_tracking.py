"""The metrics file, the plot and the terminal."""

import io
import json
import math
import subprocess
import sys

from rich.console import Console

from miles.tracking.console import RunConsole
from miles.tracking.metrics_file import MetricsFile, eval_means, read_metrics
from miles.tracking.plot import curves


def written(tmp_path):
    file = MetricsFile(tmp_path)
    file.write("eval", 0, 0, {"eval/sums": 0.4, "eval/sums-truncated_ratio": 0.1, "perf/eval_time": 1.0})
    file.write("rollout", 0, 1, {"rollout/raw_reward": 0.3, "train/loss": math.nan})
    file.write("rollout", 1, 2, {"rollout/raw_reward": 0.5})
    file.write("eval", 1, 2, {"eval/sums": 0.6, "eval/sums/response_len/mean": 9.0, "eval/step": 1.0})
    file.close()
    return file.path


def test_every_line_is_json_that_any_parser_takes(tmp_path):
    path = written(tmp_path)
    rows = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in path.read_text().splitlines()]
    assert rows[1]["train/loss"] is None
    assert [row["event"] for row in rows] == ["eval", "rollout", "rollout", "eval"]


def test_a_torn_last_line_is_left_out_and_a_resumed_run_appends(tmp_path):
    path = written(tmp_path)
    with path.open("a") as file:
        file.write('{"event": "roll')
    assert len(read_metrics(path)) == 4
    again = MetricsFile(tmp_path)
    again.write("rollout", 2, 3, {})
    again.close()
    assert [row["rollout_id"] for row in read_metrics(path)] == [0, 0, 1, 1, 2]


def test_what_a_resumed_run_does_anew_takes_the_place_of_what_was_done_before(tmp_path):
    path = written(tmp_path)
    again = MetricsFile(tmp_path)
    again.write("eval", 1, 1, {"eval/sums": 0.5})
    again.write("rollout", 1, 2, {"rollout/raw_reward": 0.7})
    again.close()
    rows = read_metrics(path)
    assert [(row["event"], row["rollouts_done"]) for row in rows] == [
        ("eval", 0), ("rollout", 1), ("eval", 1), ("rollout", 2),
    ]  # fmt: skip
    assert rows[-1]["rollout/raw_reward"] == 0.7


def test_the_plot_has_a_curve_for_training_and_one_for_each_set(tmp_path):
    found = curves(read_metrics(written(tmp_path)))
    assert [(label, points) for label, points, _ in found] == [
        ("training", [(0, 0.3), (1, 0.5)]),
        ("eval/sums", [(0, 0.4), (2, 0.6)]),
    ]


def test_a_set_may_have_hyphens_in_its_name():
    told = ["eval/gsm-8k-truncated_ratio", "eval/step", "eval/gsm-8k/response_len/mean", "perf/eval_time"]
    assert eval_means(["eval/gsm-8k", *told]) == ["eval/gsm-8k"]


def test_the_plot_is_a_picture_also_of_a_run_without_metrics(tmp_path):
    for name, write in {"run": written, "empty": lambda path: MetricsFile(path).close()}.items():
        run_dir = tmp_path / name
        run_dir.mkdir()
        write(run_dir)
        subprocess.run([sys.executable, "-m", "miles.tracking.plot", run_dir], check=True, timeout=60)
        assert (run_dir / "reward.png").read_bytes().startswith(b"\x89PNG")


def shown(use, *, terminal=False):
    file = io.StringIO()
    console = RunConsole(Console(file=file, width=200, force_terminal=terminal, highlight=False))
    use(console)
    return file.getvalue()


def test_a_step_is_one_line_with_what_there_is():
    text = shown(
        lambda c: c.step(4, 100, {"rollout/raw_reward": 0.25, "perf/step_time": 3.21, "perf/rollout_time": 2.0})
    )
    assert text == "rollout   5/100  reward 0.250  3.2 s (generate 2.0)\n"


def test_supervised_training_has_no_reward_to_show():
    def use(console):
        console.shows_reward = False
        console.step(0, 2, {"rollout/raw_reward": 0.0, "train/loss": -0.00001, "perf/step_time": 1.0})

    assert shown(use) == "rollout 1/2  loss 0.0000  1.0 s\n"


def test_the_live_view_leaves_nothing_in_a_file():
    def use(console):
        with console.live(), console.bars(2, 0):
            with console.phase("generate"):
                console.show({"finished": 3, "target": 8, "tokens": 100})
            console.advance(1)
            console.say("done")

    assert shown(use) == "done\n"
    assert shown(use, terminal=True) == "done\n"  # colours may be wanted in a pipe; it is no terminal for that


def test_a_line_is_one_line_however_narrow_the_terminal():
    file = io.StringIO()
    RunConsole(Console(file=file, width=40, highlight=False)).say("x" * 100)
    assert file.getvalue() == "x" * 100 + "\n"


def test_the_end_shows_accuracy_before_and_after_and_sample_answers():
    example = {"prompt": "<|im_start|>1+1=[?]<|im_end|>\n", "response": "2<|im_end|>", "label": "2", "reward": 1.0}
    text = shown(lambda c: c.finish({"eval/sums": 0.4}, {"eval/sums": 0.9, "eval/sums-pass@2": 1.0}, [example]))
    assert "0.400" in text
    assert "0.900" in text
    assert "1+1=[?]" in text  # text of models is never markup
    assert "pass@2" not in text
    assert "<|" not in text
