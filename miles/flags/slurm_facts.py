"""The Slurm allocation that this process stands in, as its environment tells. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from miles.flags.hosts import expand, split_words

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    """An allocation; without nodes: there is none.

    Attributes:
        job: Its id.
        nodes: Names of its nodes, in Slurm's order.
        cpus: Of each node that belong to the job; empty where Slurm does not say.
        gpus: Of each node, where all have the same number and Slurm says so; 0: it does not say.
        here: The node that this process runs on; empty on a login node.
        error: Why the list of nodes cannot be read.
    """

    job: str = ""
    nodes: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    gpus: int = 0
    here: str = ""
    error: str = ""

    def gpus_of(self, _node: str) -> int | None:
        """GPUs of a node that belong to the job; None: Slurm does not say."""
        return self.gpus or None

    def cpus_of(self, node: str) -> int | None:
        """CPUs of a node that belong to the job; None: Slurm does not say."""
        return dict(zip(self.nodes, self.cpus, strict=False)).get(node)


def slurm_facts(environ: Mapping[str, str]) -> SlurmFacts:
    """From ``SLURM_JOB_ID``, ``SLURM_JOB_NODELIST``, ``SLURM_JOB_CPUS_PER_NODE``, ``SLURM_GPUS_PER_NODE``,
    ``SLURMD_NODENAME``."""
    job, written = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_JOB_NODELIST", "")
    if not job or not written:
        return SlurmFacts()
    try:
        nodes = tuple(name for word in split_words(written) for name in expand(word))
    except ValueError as error:
        return SlurmFacts(job, error=f"SLURM_JOB_NODELIST={written}: {error}")
    cpus = tuple(repeated(environ.get("SLURM_JOB_CPUS_PER_NODE", "")))
    gpus = environ.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]  # perhaps "h100:8"
    return SlurmFacts(
        job,
        nodes,
        cpus if len(cpus) == len(nodes) else (),
        int(gpus) if gpus.isdecimal() else 0,
        environ.get("SLURMD_NODENAME", ""),
    )


def repeated(text: str) -> list[int]:
    """``8(x2),4``: 8, 8, 4. Nothing if it is written otherwise."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        match = _COUNT.fullmatch(part)
        if match is None:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found
