"""A toy scheduler: it has two nodes, and gives them to three training jobs as they become free.

    python examples/embedding/scheduler.py --hf-checkpoint MODEL --prompt-data PROMPTS ... (the flags of train.py)

All three jobs run in this one process, two of them at the same time. The nodes are two halves of this machine; a real
scheduler has a ``Node`` that starts ``invitation.command()`` on a machine of its own (docs/embedding.md).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from miles_launcher import Job, LocalNode, Node, NodeNeed
from miles_launcher.job_events import Ended, NodeLost, Recovered, Step


class Pool:
    """Nodes that wait for a job. It is what a job knows of a scheduler: a ``NodeProvider``."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._free = list(nodes)
        self._changed = asyncio.Condition()

    async def request(self, need: NodeNeed) -> Sequence[Node]:
        """One node per job, in the order in which jobs ask."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            node = self._free.pop(0)
        print(f"{need.job} gets {node.name} for {need.devices} {need.kind} devices")
        return [node]

    async def release(self, node: Node) -> None:
        """The next one may have it."""
        async with self._changed:
            self._free.append(node)
            self._changed.notify()

    async def lost(self, node: Node, why: str) -> None:
        """A real scheduler would repair it; this one has a node less."""
        print(f"{node.name} is lost: {why}")


async def watch(job: Job) -> None:
    """Tell how a job goes."""
    async for event in job.events():
        match event:
            case Step(rollout_id=done, num_rollout=wanted, metrics=metrics):
                print(f"{job.name}: iteration {done + 1} of {wanted}, {metrics['perf/step_time']:.1f} s")
            case Recovered(text=text) | NodeLost(why=text):
                print(f"{job.name}: {text}")
            case Ended(outcome=outcome, error=error):
                print(f"{job.name}: {outcome}" + (f", {error.what}" if error else ""))


async def main(flags: Sequence[str]) -> int:
    """Queue three jobs that differ in their seed; returns how many have not finished."""
    pool = Pool([LocalNode("left", cpu_slots=1), LocalNode("right", cpu_slots=1)])
    jobs = []
    for number in range(3):
        own = ["--seed", str(number), "--run-dir", f"runs/queued-{number}"]
        jobs.append(await Job.from_flags([*flags, *own], nodes=pool, name=f"job-{number}"))
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            job.start()
            group.create_task(watch(job))
    for job in jobs:
        print(f"{job.name}: metrics in {job.artefacts().metrics}")
    return sum(job.state != "finished" for job in jobs)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
