"""Which of a host's GPUs an agent would offer there: only these are the run's concern. Pure."""

from __future__ import annotations

from miles_agents.agent.inventory import BadVisibleDevices, select_visible
from miles_agents.node_info import Gpu
from miles_launcher.preflight.facts import AboutGpu, HostFacts

VISIBLE = "CUDA_VISIBLE_DEVICES"


def offered(facts: HostFacts) -> list[AboutGpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` of the process that answered leaves, in its order; all where it is not set.

    How many a hostfile, ``--num-gpus-per-node`` or Slurm give is in that variable, too. Raises BadVisibleDevices.
    """
    if "gpus" not in facts:
        return []
    every = facts["gpus"]["gpus"]
    visible = facts.get("env", {}).get(VISIBLE)
    if visible is None or not every:
        return every
    known = [Gpu(gpu["index"], gpu.get("uuid", ""), gpu["name"], gpu["total_bytes"]) for gpu in every]
    by_index = {gpu["index"]: gpu for gpu in every}
    return [by_index[gpu.index] for gpu in select_visible(known, visible)]


def count(facts: HostFacts) -> int | None:
    """How many; None where that could not be found out."""
    try:
        return len(offered(facts)) if "gpus" in facts else None
    except BadVisibleDevices:
        return None


def models(facts: HostFacts) -> list[str]:
    """Names of those that are offered; none where that could not be found out."""
    return [gpu["name"] for gpu in offered(facts)] if count(facts) else []
