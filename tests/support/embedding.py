"""Embedded jobs in tests: flags that are right, schedulers and machines that remember what they were told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from miles_launcher import Invitation, Job, Node, NodeNeed
from miles_launcher.job_events import Ended
from support.tiny_models import tiny_model
from support.training_runs import GRPO, write_prompts


def job_flags(directory: Path) -> list[str]:
    """Of a colocated job with two ranks and two engines."""
    given = {
        **GRPO, "--hf-checkpoint": tiny_model("qwen3"), "--prompt-data": write_prompts(directory / "prompts.jsonl"),
        "--custom-rm-path": "math.floor", "--colocate": True, "--actor-num-gpus-per-node": 2,
    }  # fmt: skip
    return [str(word) for name, value in given.items() for word in ((name,) if value is True else (name, value))]


class Scheduler:
    """A provider that remembers what it is asked and told; ``nodes`` None: it never has any."""

    def __init__(self, nodes: Sequence[Node] | None = None) -> None:
        self.nodes = nodes
        self.needs: list[NodeNeed] = []
        self.told: list[tuple[str, str]] = []

    async def request(self, need: NodeNeed) -> Sequence[Node]:
        self.needs.append(need)
        if self.nodes is None:
            await asyncio.Event().wait()
        return self.nodes or []

    async def release(self, node: Node) -> None:
        self.told.append(("released", node.name))

    async def lost(self, node: Node, why: str) -> None:
        self.told.append(("lost", node.name))


class Machine:
    """A node whose agent never comes."""

    def __init__(self, name: str = "m-0", fails: Exception | None = None) -> None:
        self.name = name
        self.fails = fails
        self.invitation: Invitation | None = None
        self.stops = 0

    async def start(self, invitation: Invitation) -> None:
        self.invitation = invitation
        if self.fails is not None:
            raise self.fails

    async def stop(self) -> None:
        self.stops += 1


async def ended(job: Job) -> Any:
    """The error that ended it, which every listener is told, too."""
    with pytest.raises(Exception) as caught:
        async with asyncio.timeout(60):
            await job.wait()
    told = [event async for event in job.events()]
    assert isinstance(told[-1], Ended)
    assert caught.value is told[-1].error is job.error
    assert job.state == told[-1].outcome
    return caught.value
