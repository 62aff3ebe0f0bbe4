"""What the codec's callers see: its limits, its errors, and the values that stand in for libraries not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles_agents.errors import ConfigError, EnvironmentFault, PeerFault
from miles_agents.wire.transport import Buffer

MAX_BODY_BYTES = 256 * 1024 * 1024
"""Body and buffers of one message together. More than this goes through the shared-memory store."""


@dataclass(frozen=True, slots=True)
class OpaqueArray:
    """A numpy array in a process without numpy: it can be passed on and arrives as the array that it was.

    Attributes:
        dtype: The dtype as plain data (``"<f4"``, or a list for a structured dtype).
        shape: Lengths of the dimensions.
        order: ``"C"`` or ``"F"``: how the elements lie in the buffer.
        buffer: The elements, without gaps.
    """

    dtype: Any
    shape: tuple[int, ...]
    order: str
    buffer: Buffer


@dataclass(frozen=True, slots=True)
class OpaqueTensor:
    """A torch tensor in a process without torch. ``dtype`` is torch's name for it (``"bfloat16"``)."""

    dtype: str
    shape: tuple[int, ...]
    buffer: Buffer


@dataclass(frozen=True, slots=True)
class OpaqueValue:
    """A small value of a library that is not loaded (``kind="torch.Size"``, ``"numpy.dtype"``), as plain data."""

    kind: str
    data: Any


class CannotTravel(ConfigError):
    """A value holds something that has no form on the wire. ``fields["path"]`` says where."""

    code = "E-CODEC-001"


class TooLarge(ConfigError):
    """One message would carry more than ``MAX_BODY_BYTES``."""

    code = "E-CODEC-002"


class MalformedBody(PeerFault):
    """A body arrived that no codec of this version made, or whose content its class refuses."""

    code = "E-CODEC-003"


class UnknownType(ConfigError):
    """A body names a type that this process has not registered, or has registered with other fields."""

    code = "E-CODEC-004"


class BadRegistration(ConfigError):
    """A class cannot be registered: its name is taken by another class, or it is of a kind that has no recipe."""

    code = "E-CODEC-005"


class LibraryMissing(EnvironmentFault):
    """An array or a tensor arrived where its library is not installed."""

    code = "E-CODEC-006"
