"""The command line, the ways to start agents on hosts, and training jobs inside other programs (docs/embedding.md).

from miles_launcher import Job, LocalNode, NodeProvider
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_launcher.job import Job, current_job
    from miles_launcher.job_events import JobEvent
    from miles_launcher.job_values import Artefacts, JobResult, JobStatus
    from miles_launcher.node_provider import FixedNodes, Gang, Invitation, LocalNode, Node, NodeNeed, NodeProvider

_EXPORTS = {
    "Artefacts": "job_values",
    "FixedNodes": "node_provider",
    "Gang": "node_provider",
    "Invitation": "node_provider",
    "Job": "job",
    "JobEvent": "job_events",
    "JobResult": "job_values",
    "JobStatus": "job_values",
    "LocalNode": "node_provider",
    "Node": "node_provider",
    "NodeNeed": "node_provider",
    "NodeProvider": "node_provider",
    "current_job": "job",
}
__all__ = [
    "Artefacts", "FixedNodes", "Gang", "Invitation", "Job", "JobEvent", "JobResult", "JobStatus", "LocalNode", "Node",
    "NodeNeed", "NodeProvider", "current_job",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
