"""TensorBoard: event files that its web page reads. Needs the package ``tensorboard``, not torch or TensorFlow.

Files are written here by TensorBoard's own record format, without its background thread: an error of the disk belongs
to the record that met it, which is then written again to a new file (what follows a torn record cannot be read).
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from miles.tracking.tracker import Begun, Examples, Outcome, Point, RunInfo, as_markdown

_FILE_VERSION = "brain.Event:2"
_numbers = itertools.count(1)


class TensorBoardTracker:
    """See the module's docstring."""

    name: ClassVar[str] = "TensorBoard"

    def __init__(self) -> None:
        self._directory = Path()
        self._file: Any = None
        self._resumed_at: int | None = None

    def begin(self, run: RunInfo, before: Mapping[str, Any]) -> Begun:
        """Event files go to ``directory_of``; those of an earlier run there are continued."""
        import tensorboard.summary.writer.record_writer  # noqa: F401  # what is missing is told now

        self._directory = directory_of(run, before)
        steps = set(run.first_steps.values())
        if run.start_rollout_id > 0 and len(steps) == 1:
            # Readers drop what an earlier run wrote from here on. They compare with the steps of all curves: where
            # rollouts and optimizer steps are numbered differently, it would be wrong for one of them.
            self._resumed_at = steps.pop()
        self._open()
        return Begun({"directory": str(self._directory)}, f"TensorBoard: tensorboard --logdir {self._directory}")

    def log(self, point: Point) -> None:
        """One scalar per metric."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        by_step: dict[int, list[Any]] = {}
        for name, value in point.metrics.items():
            by_step.setdefault(point.step_of(name), []).append(Summary.Value(tag=name, simple_value=value))
        self._write(
            [
                Event(wall_time=point.time, step=step, summary=Summary(value=values))
                for step, values in sorted(by_step.items())
            ]
        )

    def examples(self, examples: Examples) -> None:
        """A table on the page of texts."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        text = as_markdown(examples.rows).encode()
        value = Summary.Value(
            tag="eval/examples/text_summary",
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
            tensor=TensorProto(dtype="DT_STRING", string_val=[text], tensor_shape=one),
        )
        self._write([Event(wall_time=time.time(), step=examples.step, summary=Summary(value=[value]))])

    def artefact(self, path: Path) -> None:
        """TensorBoard has no place for files."""

    def finish(self, outcome: Outcome) -> str:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        return ""

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (self._directory / name).open("xb", buffering=0)
        events = [Event(wall_time=now, file_version=_FILE_VERSION)]
        if self._resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=now, step=self._resumed_at, session_log=start))
        self._write(events)
        self._resumed_at = None

    def _write(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            self._open()
        file, self._file = self._file, None  # lost, unless everything is written
        try:
            writer = RecordWriter(_Whole(file))
            for event in events:
                writer.write(event.SerializeToString())
        except BaseException:
            file.close()
            raise
        self._file = file


class _Whole:
    """A raw file that writes all of it, or raises."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]


def directory_of(run: RunInfo, before: Mapping[str, Any]) -> Path:
    """``--tensorboard-dir``, else ``TENSORBOARD_DIR``, else that of the run that is continued, else ``tensorboard`` in
    the run directory; below it, ``--tb-project-name`` and ``--tb-experiment-name``."""
    settings = run.settings
    named = settings.get("tensorboard_dir") or os.environ.get("TENSORBOARD_DIR")
    if not named and before.get("directory"):
        return Path(before["directory"])
    base = Path(named) if named else Path(run.run_dir) / "tensorboard"
    below = [settings.get(key) for key in ("tb_project_name", "tb_experiment_name")]
    return base.joinpath(*(str(part).strip("/") for part in below if part)).absolute()
