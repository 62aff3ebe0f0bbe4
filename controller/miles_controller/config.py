"""How a controller is set up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from miles_agents.timings import Timings

FORWARDED_PREFIXES = ("NCCL_", "CUDA_", "TORCH", "NVTE_", "SGLANG_", "HF_", "WANDB_", "MILES_")
FORWARDED_NAMES = frozenset({"PYTHONPATH", "http_proxy", "https_proxy", "no_proxy", "all_proxy"})
# These describe one process or one machine, not the run.
_LOCAL_NAMES = frozenset(
    {"CUDA_VISIBLE_DEVICES", "MILES_RUN", "MILES_KEY_FD", "MILES_REAPER_FD", "MILES_WORKER_FD"}
) | {
    "MILES_NODE_PATH",
    "MILES_NODE_ADDRESS",
    "MILES_REAPER_SAYS",
    "MILES_REAPER_REMOVES",
}


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """All that a controller needs to know before it starts.

    Attributes:
        bind: Where agents dial. Name the cluster's interface; port 0 takes a free one.
        nodes: Names of nodes that may join; ``issue_key`` adds to them.
        run_dir: Events and logs go here; None: no files.
        run_id: Names the run; made up if None. Letters, digits, ``.``, ``_``, ``-``.
        env: Variables for all remote processes, over those that are forwarded.
        forward_env: Forward the variables of ``FORWARDED_PREFIXES`` and ``FORWARDED_NAMES``.
        status: Serve the status snapshot over loopback HTTP.
        overdue_s: Calls older than this, and than five times the longest of their kind, are reported with a stack.
    """

    bind: str = "tcp://127.0.0.1:0"
    nodes: tuple[str, ...] = ()
    run_dir: Path | None = None
    run_id: str | None = None
    timings: Timings = field(default_factory=Timings)
    env: Mapping[str, str] = field(default_factory=dict)
    forward_env: bool = True
    status: bool = True
    overdue_s: float = 60.0
    leave_timeout_s: float = 30.0

    @property
    def is_local(self) -> bool:
        """Only agents of this machine can dial."""
        host = urlsplit(self.bind).hostname or ""
        return host in {"localhost", "::1"} or host.startswith("127.")


def forwarded_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of this process that remote processes get, too."""
    found = os.environ if environ is None else environ
    return {
        name: value
        for name, value in found.items()
        if name not in _LOCAL_NAMES and (name.startswith(FORWARDED_PREFIXES) or name.lower() in _lowered())
    }


def _lowered() -> frozenset[str]:
    return frozenset(name.lower() for name in FORWARDED_NAMES)
