"""MLflow: a tracking server, or a database file. Needs the package ``mlflow-skinny`` (or ``mlflow``).

Without ``--mlflow-tracking-uri`` and ``MLFLOW_TRACKING_URI`` it is a SQLite file in the run directory. A password in
the URI is moved to the variables that MLflow reads, so that no message of its has it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from miles.tracking.tracker import Begun, Examples, Outcome, Point, RunInfo, TrackerUnusable

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_BATCH = 100
"""Parameters and tags per request that every server takes; metrics may be more."""
_METRICS_BATCH = 900
_MAX_PARAM = 500
_UNKNOWN = re.compile(r"[^\w\-. :/]")
T = TypeVar("T")


class MlflowTracker:
    """See the module's docstring."""

    name: ClassVar[str] = "MLflow"

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""

    def begin(self, run: RunInfo, before: Mapping[str, Any]) -> Begun:
        """Create a run, or go on with that of ``--mlflow-run-id``, or with that of the checkpoint."""
        # Delivery tries again by itself, and tells it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow.tracking import MlflowClient

        settings = run.settings
        uri = without_password(uri_of(run, before))
        client = self._client = MlflowClient(tracking_uri=uri)
        continued = before if before.get("uri") == uri else {}
        named = settings.get("mlflow_run_id")
        run_id: str = named or continued.get("run_id") or ""
        experiment = self._taken_up(run_id, is_needed=bool(named)) if run_id else None
        if experiment is None:
            experiment = self._experiment(settings.get("mlflow_experiment_name") or "miles", uri)
            run_id = client.create_run(
                experiment,
                run_name=settings.get("mlflow_run_name") or run.name,
                tags={
                    "miles.run_id": run.run_id,
                    "miles.run_dir": run.run_dir,
                    **{f"version.{package}": version for package, version in run.versions.items()},
                },
            ).info.run_id
            self._log_params(run_id, run.config)
        self._run_id = run_id
        where = f"{uri}/#/experiments/{experiment}/runs/{run_id}" if uri.startswith("http") else uri
        told = where if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri} (run {run_id})"
        return Begun({"uri": uri, "run_id": run_id}, f"MLflow: {told}")

    def _taken_up(self, run_id: str, *, is_needed: bool) -> str | None:
        """The experiment of a run that goes on. None: there is no such run any more."""
        from mlflow.exceptions import MlflowException

        try:
            experiment = str(self._client.get_run(run_id).info.experiment_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            if is_needed:
                raise TrackerUnusable(
                    f"there is no MLflow run {run_id}", advice="Correct --mlflow-run-id, or leave it out"
                ) from None
            return None
        self._client.update_run(run_id, status="RUNNING")
        return experiment

    def _experiment(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        place = (
            Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts" if uri.startswith("sqlite:///") else None
        )
        return str(self._client.create_experiment(name, artifact_location=None if place is None else place.as_uri()))

    def _log_params(self, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, _text(value)) for key, value in config.items() if value is not None]
        for part in _parts(params, _BATCH):
            self._client.log_batch(run_id, params=part)

    def log(self, point: Point) -> None:
        """One value per metric. ``@`` is ``_at_`` in names, which MLflow does not take."""
        from mlflow.entities import Metric

        at = int(point.time * 1000)
        values = [
            Metric(metric_name(name), float(value), at, point.step_of(name)) for name, value in point.metrics.items()
        ]
        for part in _parts(values, _METRICS_BATCH):
            self._client.log_batch(self._run_id, metrics=part)

    def examples(self, examples: Examples) -> None:
        """A JSON file per evaluation."""
        text = json.dumps(list(examples.rows), indent=1, ensure_ascii=False)
        self._client.log_text(self._run_id, text, f"examples/eval_{examples.step}.json")

    def artefact(self, path: Path) -> None:
        """A file of the run."""
        self._client.log_artifact(self._run_id, str(path))

    def finish(self, outcome: Outcome) -> str:
        """Say how it ended."""
        self._client.set_terminated(self._run_id, _STATUS[outcome.how])
        return ""


def uri_of(run: RunInfo, before: Mapping[str, Any]) -> str:
    """The server or database; that of the run that is continued if nobody names another one."""
    named = run.settings.get("mlflow_tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or before.get("uri")
    return str(named or f"sqlite:///{Path(run.run_dir).absolute() / 'mlflow.db'}")


def without_password(uri: str) -> str:
    """The URI of a server without user and password, which are in ``MLFLOW_TRACKING_USERNAME`` and ``..._PASSWORD``
    afterwards. A database's stays as it is: its driver needs them there."""
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"} or "@" not in parts.netloc:
        return uri
    user, _, rest = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(name), unquote(password)
    return urlunsplit(parts._replace(netloc=rest))


def metric_name(name: str) -> str:
    """As MLflow takes it."""
    return _UNKNOWN.sub("_", name.replace("@", "_at_"))


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:_MAX_PARAM]


def _parts(values: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
