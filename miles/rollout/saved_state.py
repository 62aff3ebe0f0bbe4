"""Files of the rollout's state: written aside, made durable, renamed. Samples in the runtime's own encoding."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from miles.rollout.base_types import Group
from miles.utils.types import Sample
from miles_agents.errors import ConfigError, EnvironmentFault
from miles_agents.wire.codec import decode, encode
from miles_agents.wire.codec_types import CannotTravel


class CannotSave(EnvironmentFault):
    """A file of the rollout's state cannot be written."""

    code = "E-ROLL-011"


class NotSavable(ConfigError):
    """A sample that has to be saved holds an object that cannot be."""

    code = "E-ROLL-012"


def write_values(path: Path, values: Iterable[Any]) -> None:
    """Write values, each of up to 256 MiB. ``path`` is as before until all are written.

    Raises:
        CannotSave: The disk is full, or the directory cannot be written.
        NotSavable: A value holds an object of a class that is not registered; names the path to it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for value in values:
                body, buffers = encode(value, what="saved")
                file.write(msgpack.packb([body, [bytes(buffer) for buffer in buffers]]))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as error:
        raise cannot_save(path, error) from error
    except CannotTravel as error:
        raise NotSavable(
            f"{path.name}: a sample in the rollout buffer cannot be saved",
            evidence=f"{error.what}\n{error.evidence}",
            advice="Keep plain values, arrays or registered types in the metadata of samples.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def cannot_save(path: Path, error: OSError) -> CannotSave:
    """The error for a file that could not be written; what was there before is untouched."""
    return CannotSave(
        f"{path} cannot be written",
        evidence=str(error),
        advice="Make room, or give --save a directory that can be written. What was saved before is untouched.",
    )


def read_values(path: Path) -> Iterator[Any]:
    """What ``write_values`` wrote."""
    with path.open("rb") as file:
        for body, buffers in msgpack.Unpacker(file, max_buffer_size=0):
            yield decode(body, [bytearray(buffer) for buffer in buffers], libraries="import")


def plain_group(group: Group) -> list[Any]:
    """A group with its samples as dicts."""
    return [[s.to_dict() for s in e] if isinstance(e, list) else e.to_dict() for e in group]


def group_from_plain(plain: list[Any]) -> Group:
    """Inverse of ``plain_group``."""
    return [[Sample.from_dict(s) for s in e] if isinstance(e, list) else Sample.from_dict(e) for e in plain]
