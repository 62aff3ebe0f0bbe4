"""MLflow with a database in a file, read back by its client; and a server that answers 500."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.fake_trackers import run_info

from miles.tracking.mlflow_tracker import MlflowTracker, metric_name, uri_of, without_password


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    # setenv first, so that what the tracker sets is gone afterwards.
    for name in (
        "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def begun(tmp_path, before=None, config=None, **settings):
    tracker = MlflowTracker()
    changes = {} if config is None else {"config": config}
    return tracker, tracker.begin(run_info(run_dir=str(tmp_path), settings=settings, **changes), before or {})


@pytest.mark.full
def test_a_run_in_a_database_is_read_back_by_the_client_and_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "support.mlflow_session", tmp_path], capture_output=True, text=True, timeout=100,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run_id, uri = found["remembered"]["run_id"], found["remembered"]["uri"]
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert f"mlflow ui --backend-store-uri {uri}" in found["told"]
    assert (found["status"], found["name"], found["last_word"]) == ("KILLED", "my-run", "")
    assert found["tags"]["miles.run_id"] == "run-1"
    assert (found["params"]["lr"], len(found["params"]["big"])) == ("0.1", 500)
    assert found["histories"]["train/loss"] == [[7, "0.5", 10**12]]
    assert found["histories"]["passrate/pass_at_2"][0][:2] == [3, "nan"]
    assert found["histories"]["user/949"][0][0] == 4
    files = f"mlflow-artifacts/{run_id}/artifacts"
    assert found["artefacts"] == [f"{files}/config.json", f"{files}/examples/eval_4.json"]
    assert json.loads((tmp_path / files / "examples" / "eval_4.json").read_text()) == [{"response": "größe"}]
    assert found["again"][:2] == [found["remembered"], "FINISHED"]
    assert found["again"][2][0][:2] == [5, "1.0"]
    assert found["unknown"] == "there is no MLflow run " + "0" * 32
    assert found["gone"]["run_id"] not in (run_id, "0" * 32)


@pytest.mark.full
def test_a_server_that_fails_is_an_error_and_the_password_is_not_in_it():
    seen = []

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815  # http.server names it

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:hunter2@127.0.0.1:{server.server_port}"
        with pytest.raises(Exception, match="500") as caught:
            begun("/nowhere", mlflow_tracking_uri=uri)
        server.shutdown()
    assert "hunter2" not in str(caught.value)
    assert seen[0].startswith("Basic ")


def test_names_and_places(monkeypatch):
    assert metric_name("eval/a-pass@2") == "eval/a-pass_at_2"
    assert metric_name("error_cat/(others)") == "error_cat/_others_"
    run = run_info(run_dir="/r")
    assert uri_of(run, {}) == "sqlite:////r/mlflow.db"
    assert uri_of(run, {"uri": "sqlite:////old.db"}) == "sqlite:////old.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert uri_of(run, {"uri": "sqlite:////old.db"}) == "http://env"
    assert without_password("postgresql://me:pw@h/db") == "postgresql://me:pw@h/db"
    assert without_password("https://me@h/x") == "https://h/x"
