"""Nodes of a scheduler: whatever goes wrong, on which side ever, each is stopped and then released or told as lost."""

import asyncio
import os
import signal

import pytest
from support.embedding import Machine, Scheduler, ended, job_flags
from support.procs import eventually

from miles_launcher import FixedNodes, Job, LocalNode
from miles_launcher.job import JobBroke, JobCancelled, JobWouldNotEnd, NodeTakenAway
from miles_launcher.job_events import NodeJoined, NodeLost, Phase, Trouble
from miles_launcher.provided_nodes import BadNodes, NodeNotStarted, NotItsNode


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    async def resolved():
        return (await Job.from_flags(job_flags(tmp_path_factory.mktemp("flags"))))._config

    return asyncio.run(resolved())


@pytest.fixture
def new_job(config, tmp_path):
    def new(nodes, **options):
        return Job({**config, "run_dir": str(tmp_path / "run")}, nodes=nodes, **options)

    return new


@pytest.mark.parametrize(
    ("nodes", "kind", "released"),
    [
        ([], BadNodes, []),
        ([Machine("m"), Machine("m")], BadNodes, ["m", "m"]),
        ([Machine("a"), Machine("b", OSError("no such host"))], NodeNotStarted, ["a", "b"]),
        ([Machine("a", JobBroke("typed")), Machine("b")], JobBroke, ["a", "b"]),
    ],
    ids=["none", "twice", "raises", "raises one of ours"],
)
async def test_nodes_that_cannot_be_used_are_told_and_all_are_given_back(new_job, nodes, kind, released):
    scheduler = Scheduler(nodes)
    job = new_job(scheduler)
    job.start()
    error = await ended(job)
    assert isinstance(error, kind)
    assert sorted(scheduler.told) == [("released", name) for name in released]
    assert all(node.stops == 1 for node in nodes)
    assert "no such host" in error.evidence or kind is not NodeNotStarted


async def test_a_scheduler_that_raises_ends_the_job_with_its_error_as_cause(new_job):
    class Broken(Scheduler):
        async def request(self, need):
            raise KeyError("quota")

    job = new_job(Broken())
    job.start()
    error = await ended(job)
    assert isinstance(error, JobBroke)
    assert isinstance(error.__cause__, KeyError)


async def test_a_scheduler_that_raises_at_the_end_keeps_no_node_from_being_given_back(new_job):
    class Broken(Scheduler):
        async def release(self, node):
            await super().release(node)
            raise RuntimeError("database is gone")

    scheduler = Broken([Machine("a"), Machine("b")])
    job = new_job(scheduler)
    job.start()
    await eventually(lambda: all(machine.invitation for machine in scheduler.nodes))
    await job.cancel()
    assert sorted(scheduler.told) == [("released", "a"), ("released", "b")]
    told = [event.text async for event in job.events() if isinstance(event, Trouble)]
    assert sorted(text for text in told if "database is gone" in text) == [
        "releasing a failed: RuntimeError: database is gone", "releasing b failed: RuntimeError: database is gone",
    ]  # fmt: skip


async def test_an_invitation_has_all_that_an_agent_needs_and_shows_no_secret(new_job):
    machine = Machine()
    async with new_job(Scheduler([machine]), bind="tcp://127.0.0.1:0") as job:
        await eventually(lambda: machine.invitation)
        invitation = machine.invitation
        assert invitation.address.startswith("tcp://127.0.0.1:")
        command = invitation.command("/opt/python")
        assert command[:6] == ["/opt/python", "-m", "miles_launcher.cli", "agent", "--node", "m-0"]
        assert command[command.index("--controller") + 1] == invitation.address
        assert invitation.local_address in invitation.command(is_local=True)
        assert invitation.key_line().endswith(b"}\n")
        assert invitation.key not in repr(invitation) + " ".join(command)
        assert invitation.run_id == job.status().run_id
        assert [(node.name, node.state) for node in job.status().nodes] == [("m-0", "expected")]


async def test_a_node_that_dies_is_told_as_lost_and_not_released(new_job):
    node = LocalNode("n-0", cpu_slots=2)
    scheduler = Scheduler([node, LocalNode("n-1", cpu_slots=1), Machine("never")])
    async with new_job(scheduler) as job:
        events = job.events()
        seen = []
        while not isinstance(event := await anext(events), NodeJoined) or event.node != "n-0":
            seen.append(event)
        assert Phase in map(type, seen)
        assert job.status().nodes[0].devices == 2
        os.kill(node._agents.agents["n-0"].pid, signal.SIGTERM)
        while not isinstance(event := await anext(events), NodeLost):
            pass
        assert event.node == "n-0"
        await eventually(lambda: scheduler.told == [("lost", "n-0")], 60)
        with pytest.raises(NotItsNode):
            job.node_lost("n-0", "again")
        await events.aclose()
    assert sorted(scheduler.told) == [("lost", "n-0"), ("released", "n-1"), ("released", "never")]


async def test_the_scheduler_can_say_that_a_node_is_lost_or_wanted_back(new_job):
    scheduler = Scheduler([LocalNode("n-0", cpu_slots=1), LocalNode("n-1", cpu_slots=1), Machine("never")])
    job = new_job(scheduler)
    with pytest.raises(NotItsNode):
        await job.take_away("n-0", "before it began")
    job.start()
    await eventually(lambda: [one.state for one in job.status().nodes][:2] == ["alive"] * 2, 60)
    job.node_lost("n-0", "its machine was destroyed")
    await eventually(lambda: ("lost", "n-0") in scheduler.told, 60)
    with pytest.raises(NotItsNode):
        await job.take_away("n-9", "no such node")
    await job.take_away("n-1", "maintenance")
    error = await ended(job)
    assert isinstance(error, NodeTakenAway)
    assert error.fields["node"] == "n-1"
    assert sorted(scheduler.told) == [("lost", "n-0"), ("released", "n-1"), ("released", "never")]


async def test_an_end_that_takes_too_long_is_told_and_goes_on(new_job):
    hold = asyncio.Event()

    class Slow(Machine):
        async def stop(self):
            await hold.wait()

    scheduler = Scheduler([machine := Slow()])
    job = new_job(scheduler)
    job.start()
    await eventually(lambda: machine.invitation)
    with pytest.raises(JobWouldNotEnd):
        await job.cancel(timeout_s=0.05)
    assert job.state == "ending"
    hold.set()
    assert isinstance(await ended(job), JobCancelled)
    assert scheduler.told == [("released", "m-0")]


async def test_fixed_nodes_are_given_whatever_is_needed():
    node = Machine()
    provider = FixedNodes(node)
    assert await provider.request(None) == (node,)
    await provider.release(node)
    await provider.lost(node, "gone")
