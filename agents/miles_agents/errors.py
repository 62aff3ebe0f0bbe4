"""The error contract and its five kinds, sorted by whose move it is. A feature's own errors stand beside it.

The contract (docs/errors.md): a message has four parts. What failed, with its identity; the evidence; what to
do about it; and a stable code that is a heading in ``docs/errors.md``. ``str(error)`` renders the four lines.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MilesError(Exception):
    """Base of all errors that the runtime raises on purpose.

    Args:
        what: One line: what failed, naming the thing (rank, node, flag, port).
        evidence: What was seen: values, exit codes, log tails. May have many lines.
        advice: One imperative sentence: what the reader should do.
        fields: Facts for programs, plain values that travel (``error.fields["rank"]``).
    """

    code: ClassVar[str] = "E-INT-000"

    def __init__(self, what: str, *, evidence: str = "", advice: str = "", **fields: Any) -> None:
        super().__init__(what)
        self.what = what
        self.evidence = evidence
        self.advice = advice
        self.fields = fields

    def __str__(self) -> str:
        evidence = (self.evidence or "none").replace("\n", "\n    ")
        return (
            f"{self.what}\n"
            f"  evidence: {evidence}\n"
            f"  what to do: {self.advice or 'nothing is known to help; report it with the lines above'}\n"
            f"  code: {self.code} (docs/errors.md)"
        )


class ConfigError(MilesError):
    """The user's move: change a flag, an argument, a call."""

    code = "E-CFG-000"


class EnvironmentFault(MilesError):
    """The machine's move: a port, a disk, a driver, a permission, a missing program."""

    code = "E-ENV-000"


class PeerFault(MilesError):
    """Another process or node went away, or does not answer. The runtime recovers or says that it cannot."""

    code = "E-PEER-000"


class UserCodeError(MilesError):
    """The user's code raised. The user's traceback comes first."""

    code = "E-USER-000"


class InternalError(MilesError):
    """Our bug: an invariant does not hold. Asks for a report."""

    code = "E-INT-001"
