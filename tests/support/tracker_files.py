"""What trackers have written, read back."""

from __future__ import annotations

import struct
from pathlib import Path

_BLOCK = 32 * 2**10


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value by tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        values = events.Tensors(tag)
        if values[0].tensor_proto.dtype == 1:  # float
            found[tag] = [(value.step, value.tensor_proto.float_val[0]) for value in values]
    for tag in events.Tags()["scalars"]:
        found[tag] = [(value.step, value.value) for value in events.Scalars(tag)]
    return found


def texts(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """Step and text by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(one.step, one.tensor_proto.string_val[0].decode()) for one in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.Tensors(tag)[0].tensor_proto.string_val
    }


def wandb_records(run_directory: Path) -> list:
    """The records of an offline run: a log in LevelDB's format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_directory.glob("run-*.wandb")
    data, place, parts, records = path.read_bytes(), 7, [], []
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def wandb_rows(run_directory: Path) -> list[dict[str, str]]:
    """What was logged: JSON text by name."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in wandb_records(run_directory)
        if record.WhichOneof("record_type") == "history"
    ]
