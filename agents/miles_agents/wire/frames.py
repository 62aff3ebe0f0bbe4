"""What both transports make of a message before it leaves, and the errors that they share."""

from __future__ import annotations

from collections.abc import Sequence

from miles_agents.errors import EnvironmentFault, InternalError
from miles_agents.wire.transport import Buffer


class AddressUnavailable(EnvironmentFault):
    """The system does not let us listen on an address (in use, not ours, no permission)."""

    code = "E-ADDR-004"


class UnsendableMessage(InternalError):
    """A message with no frames, a frame that is not flat memory, or a frame that the peer would refuse."""

    code = "E-ADDR-005"


def flat_frames(frames: Sequence[Buffer], max_frame_bytes: int) -> tuple[list[bytes | memoryview], int]:
    """The frames of a message as flat bytes, and their size. Once the first is queued, nothing may fail any more.

    Raises:
        UnsendableMessage: no frame, a frame that is not contiguous, or one above ``max_frame_bytes``.
    """
    if len(frames) == 1 and type(frames[0]) is bytes and len(frames[0]) <= max_frame_bytes:
        return [frames[0]], len(frames[0])
    flat = [frame if type(frame) is bytes else _flat(frame) for frame in frames]
    size = sum(map(len, flat))
    if not flat or (size > max_frame_bytes and max(map(len, flat)) > max_frame_bytes):
        raise UnsendableMessage(
            f"a message of {len(flat)} frames cannot be sent",
            evidence=f"frames of {[len(frame) for frame in flat][:16]} bytes; limit {max_frame_bytes}",
            advice="Refuse or split what is too large before it reaches the transport.",
        )
    return flat, size


def _flat(frame: Buffer) -> bytes | memoryview:
    """A view of the frame's bytes. Also keeps a bytearray from being resized while zmq reads it."""
    view = memoryview(frame)
    if not view.nbytes:
        return b""
    try:
        return view.cast("B")
    except TypeError as error:
        raise UnsendableMessage(
            f"a frame of format {view.format!r} and shape {view.shape} cannot be sent",
            evidence=str(error),
            advice="Pass contiguous memory as bytes.",
        ) from error
