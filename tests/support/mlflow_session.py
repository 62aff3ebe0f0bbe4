"""``python -m support.mlflow_session DIRECTORY``: a run with MLflow that is continued, and all that its client reads
back, as JSON. A process of its own, because MLflow keeps connections and descriptors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from miles.tracking.mlflow_tracker import MlflowTracker
from miles.tracking.tracker import Examples, Outcome, Point, TrackerUnusable
from support.fake_trackers import point, run_info


def begun(directory, before=None, config=None, **settings):
    changes = {} if config is None else {"config": config}
    tracker = MlflowTracker()
    return tracker, tracker.begin(run_info(run_dir=str(directory), settings=settings, **changes), before or {})


def main(directory):
    config = {"lr": 0.1, "none": None, "big": "x" * 9000}
    tracker, first = begun(directory, config=config, mlflow_experiment_name="mine")
    tracker.log(Point({"rollout/step": 3, "train/step": 7}, {"train/loss": 0.5, "passrate/pass@2": math.nan}, 1e9))
    tracker.log(point(4, **{f"user/{n}": 1.0 for n in range(950)}))
    tracker.examples(Examples(4, [{"response": "größe"}]))
    (directory / "config.json").write_text("{}")
    tracker.artefact(directory / "config.json")
    last_word = tracker.finish(Outcome("interrupted"))
    uri, run_id = first.remembered["uri"], first.remembered["run_id"]
    client = MlflowClient(uri)

    def history(name):
        return [(m.step, str(m.value), m.timestamp) for m in client.get_metric_history(run_id, name)]

    run = client.get_run(run_id)
    found = {
        "told": first.told, "remembered": first.remembered, "last_word": last_word, "status": run.info.status,
        "name": run.info.run_name, "tags": run.data.tags, "params": run.data.params,
        "histories": {name: history(name) for name in ("train/loss", "passrate/pass_at_2", "user/949")},
        "artefacts": sorted(str(path.relative_to(directory)) for path in directory.rglob("artifacts/**/*.json")),
    }  # fmt: skip
    again, second = begun(directory / "elsewhere", first.remembered)
    again.log(point(5, rollout__x=1.0))
    again.finish(Outcome("finished"))
    found["again"] = [second.remembered, client.get_run(run_id).info.status, history("rollout/x")]
    try:
        begun(directory, mlflow_tracking_uri=uri, mlflow_run_id="0" * 32)
    except TrackerUnusable as error:
        found["unknown"] = error.what
    found["gone"] = begun(directory, {"uri": uri, "run_id": "0" * 32})[1].remembered
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
