"""TensorBoard, read back by its own reader."""

import math

import pytest
from support.fake_trackers import point, run_info
from support.tracker_files import scalars, texts

from miles.tracking.tensorboard_tracker import TensorBoardTracker, directory_of
from miles.tracking.tracker import Examples, Outcome, Point

STEPS = {"rollout/step": 3, "train/step": 7}


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)


def begun(tmp_path, before=None, **changes):
    tracker = TensorBoardTracker()
    told = tracker.begin(run_info(run_dir=str(tmp_path), **changes), before or {})
    return tracker, told


def test_each_metric_stands_at_its_step(tmp_path):
    tracker, told = begun(tmp_path)
    tracker.log(Point(STEPS, {"train/loss": 0.5, "rollout/response_len/mean": 8.0, "perf/step_time": math.inf}, 1e9))
    tracker.log(Point({"eval/step": 4, "rollout/step": 4}, {"eval/a": 1.0, "perf/eval_time": math.nan}, 1e9))
    tracker.finish(Outcome("finished"))
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(7, 0.5)]
    assert found["rollout/response_len/mean"] == [(3, 8.0)]
    assert found["perf/step_time"] == [(3, math.inf)]
    assert found["eval/a"] == [(4, 1.0)]
    assert math.isnan(found["perf/eval_time"][0][1])
    assert told.remembered == {"directory": str(tmp_path / "tensorboard")}


def test_answers_are_a_text(tmp_path):
    tracker, _ = begun(tmp_path)
    row = {"dataset": "a", "prompt": "1|2", "response": "<|im_end|>\n3", "label": None, "reward": 1.0}
    tracker.examples(Examples(5, [row]))
    tracker.finish(Outcome("finished"))
    ((step, text),) = texts(tmp_path / "tensorboard")["eval/examples/text_summary"]
    assert step == 5
    assert text.splitlines()[-1] == "| a | 1\\|2 | &lt;\\|im_end\\|><br>3 | None | 1.0 |"


def test_a_resumed_run_goes_on_in_the_same_directory_and_drops_what_was_drawn_beyond_the_checkpoint(tmp_path):
    first, told = begun(tmp_path / "a")
    for step in range(5):
        first.log(point(step, rollout__x=float(step), train__y=float(step)))
    first.finish(Outcome("failed"))
    again, _ = begun(
        tmp_path / "b", told.remembered, start_rollout_id=3, first_steps={"rollout/step": 3, "train/step": 3}
    )
    again.log(point(3, rollout__x=30.0, train__y=30.0))
    again.finish(Outcome("finished"))
    found = scalars(tmp_path / "a" / "tensorboard")
    assert found["rollout/x"] == found["train/y"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_where_axes_differ_nothing_is_dropped(tmp_path):
    first, told = begun(tmp_path)
    first.log(Point({"rollout/step": 1, "train/step": 7}, {"train/y": 1.0}, 1e9))
    first.finish(Outcome("failed"))
    again, _ = begun(tmp_path, told.remembered, start_rollout_id=2, first_steps={"rollout/step": 2, "train/step": 8})
    again.log(Point({"rollout/step": 2, "train/step": 11}, {"train/y": 2.0}, 1e9))
    again.finish(Outcome("finished"))
    assert scalars(tmp_path / "tensorboard")["train/y"] == [(7, 1.0), (11, 2.0)]


def test_a_record_that_the_disk_did_not_take_whole_is_written_to_a_new_file(tmp_path):
    tracker, _ = begun(tmp_path)
    tracker.log(point(0, rollout__x=1.0))
    file = tracker._file

    class Full:
        left = 20

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            part, self.left = data[: self.left], max(0, self.left - len(data))
            return file.write(part)

        def close(self):
            file.close()

    tracker._file = Full()
    with pytest.raises(OSError, match="No space left"):
        tracker.log(point(1, rollout__x=2.0))
    tracker.log(point(1, rollout__x=2.0))
    tracker.finish(Outcome("finished"))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path / "tensorboard")["rollout/x"] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize(
    ("settings", "variable", "before", "expected"),
    [
        ({}, None, {}, "/run/tensorboard"),
        ({}, "/env", {}, "/env"),
        ({"tensorboard_dir": "/typed"}, "/env", {"directory": "/old"}, "/typed"),
        ({"tb_project_name": "p", "tb_experiment_name": "e"}, None, {}, "/run/tensorboard/p/e"),
        ({"tensorboard_dir": "/typed", "tb_experiment_name": "/e"}, None, {}, "/typed/e"),
        ({"tb_project_name": "p"}, None, {"directory": "/old/p"}, "/old/p"),
    ],
)
def test_the_directory(monkeypatch, settings, variable, before, expected):
    if variable:
        monkeypatch.setenv("TENSORBOARD_DIR", variable)
    assert str(directory_of(run_info(run_dir="/run", settings=settings), before)) == expected
