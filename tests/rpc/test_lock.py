"""Locks and lookup as actors see them: on loops and threads, by way of the controller's endpoints."""

import asyncio

import pytest
from support.wired import eventually, virtual, wired

from miles_agents.rpc.actor import Actor, EndpointInfo, endpoint
from miles_agents.rpc.context import current_actor
from miles_agents.rpc.errors import DeadlineExceeded, NotAnActorProcess
from miles_agents.rpc.host import ActorHost
from miles_agents.rpc.inline import InlineExecutors
from miles_agents.rpc.lock import Lock, lookup
from miles_agents.rpc.lock_table import StaleLockToken
from miles_agents.rpc.mesh import ActorMesh, MeshInfo
from miles_agents.rpc.shape import Shape
from miles_agents.wire.envelope import CONTROLLER_MESH
from miles_controller.lock_service import LockService


class CancelsOnGrant(Lock):
    """Cancels the task that acquires it in the very turn of the loop that brings the grant."""

    task: asyncio.Task

    def acquire(self):
        asked = super().acquire()
        asked.add_done_callback(lambda _: self.task.cancel())
        return asked


class Worker(Actor):
    """Holds a lock for as long as it is told."""

    def __init__(self, log, controller):
        self.log = log
        self.controller = controller

    @endpoint
    async def hold(self, name, seconds):
        async with Lock("weights", controller=self.controller) as lock:
            self.log.append(f"{name} in")
            await asyncio.sleep(seconds)
            self.log.append(f"{name} out")
            token = lock.token
        assert lock.token is None
        return token

    @endpoint
    def hold_on_thread(self, name):
        with Lock("weights", controller=self.controller):
            self.log.append(f"{name} in")
            self.log.append(f"{name} out")

    @endpoint
    async def wait_at_most(self, seconds):
        try:
            async with Lock("weights", timeout_s=seconds, controller=self.controller):
                self.log.append("got it")
        except DeadlineExceeded:
            self.log.append("gave up")

    @endpoint
    async def lose(self):
        async with Lock("weights", hold_s=1.0, controller=self.controller):
            await asyncio.sleep(2.0)

    @endpoint
    async def hold_twice(self):
        """Two tasks, and then one in itself."""

        async def use(name):
            async with Lock("weights", controller=self.controller):
                self.log.append(f"{name} in")
                await asyncio.sleep(1.0)
                self.log.append(f"{name} out")

        await asyncio.gather(use("first"), use("second"))
        async with Lock("weights", controller=self.controller):
            try:
                await Lock("weights", timeout_s=2.0, controller=self.controller).acquire()
            except DeadlineExceeded:
                self.log.append("waited for itself")

    @endpoint
    async def cancel_on_leaving(self):
        lock = await Lock("weights", controller=self.controller).__aenter__()
        task = asyncio.create_task(lock.__aexit__(None, None, None))
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()

    @endpoint
    async def cancel_when_granted(self):
        lock = CancelsOnGrant("weights", controller=self.controller)
        lock.task = task = asyncio.create_task(lock.__aenter__())
        await asyncio.wait([task])
        assert task.cancelled()

    @endpoint
    async def leave_late(self):
        lock = await Lock("weights", controller=self.controller).__aenter__()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.log.append("leaves")
            await lock.__aexit__(None, None, None)

    @endpoint
    async def find(self):
        return await lookup(current_actor().mesh_name)


def controller_of(net):
    """The hub as the controller: its handle, and its locks."""
    host, locks = ActorHost(net.hub, InlineExecutors(net.loop)), LockService()
    served = {"lock_acquire": locks.acquire, "lock_give_up": locks.give_up, "lock_release": locks.release}
    for name, function in served.items():
        host.bind(EndpointInfo(name, "io", is_async=True, is_generator=False), function)
    info = MeshInfo(CONTROLLER_MESH, "controller", {0: net.hub.address.incarnation})
    return ActorMesh.from_plain(ActorMesh(info, Shape.of(controller=1)).to_plain()), locks


@virtual
async def test_a_lock_excludes_others_and_goes_to_them_in_order():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        mesh = net.spawn(Worker, log, handle, ranks=3)
        futures = [mesh.slice(ranks=rank).hold.call_one(rank, 1.0) for rank in (2, 0, 1)]
        tokens = [await future for future in futures]
        assert log == ["2 in", "2 out", "0 in", "0 out", "1 in", "1 out"]
        assert tokens == sorted(set(tokens)), "tokens only grow"
        await eventually(lambda: locks.snapshot() == {})


async def test_a_thread_holds_a_lock_too():
    async with wired() as net:
        handle, _ = controller_of(net)
        log = []
        mesh = net.spawn(Worker, log, handle, ranks=2, threads=True)
        await mesh.hold_on_thread.call("t")
        assert log == ["t in", "t out"] * 2


@virtual
async def test_who_waited_too_long_has_no_place_in_the_queue_any_more():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        mesh = net.spawn(Worker, log, handle, ranks=2)
        holds = mesh.slice(ranks=0).hold.call_one("0", 5.0)
        await mesh.slice(ranks=1).wait_at_most.call_one(2.0)
        await holds
        assert log == ["0 in", "gave up", "0 out"]
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_a_cancelled_holder_gives_the_lock_back():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        mesh = net.spawn(Worker, log, handle, ranks=2)
        holds, waits = mesh.slice(ranks=0).hold.call_one("0", 50.0), mesh.slice(ranks=1).hold.call_one("1", 1.0)
        await eventually(lambda: log == ["0 in"])
        holds.cancel()
        await waits
        assert log == ["0 in", "1 in", "1 out"]
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_who_held_it_too_long_learns_that_on_leaving():
    async with wired() as net:
        handle, _ = controller_of(net)
        mesh = net.spawn(Worker, [], handle)
        with pytest.raises(StaleLockToken):
            await mesh.lose.call_one()


@virtual
async def test_without_a_way_to_the_controller_it_says_so():
    async with wired() as net:
        mesh = net.spawn(Worker, [], None, name="lonely")
        with pytest.raises(NotAnActorProcess, match="no way to its controller") as caught:
            await mesh.find.call_one()
        assert "lonely[0]" in caught.value.evidence
    with pytest.raises(NotAnActorProcess, match="no actor here"):
        Lock("weights").acquire()


@virtual
async def test_a_grant_that_crosses_the_callers_deadline_is_taken_back():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        mesh = net.spawn(Worker, log, handle, ranks=2)
        net.delay_s = 0.5
        await mesh.slice(ranks=0).wait_at_most.call_one(0.7)  # granted at 0.5, told at 1.0, given up at 0.7
        assert log == ["gave up"]
        await mesh.slice(ranks=1).wait_at_most.call_one(20.0)
        assert log == ["gave up", "got it"]
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_tasks_of_one_process_exclude_each_other_and_one_waits_for_itself():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        await net.spawn(Worker, log, handle).hold_twice.call_one()
        assert log == ["first in", "first out", "second in", "second out", "waited for itself"]
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_a_release_goes_out_though_its_task_is_cancelled():
    async with wired() as net:
        handle, locks = controller_of(net)
        mesh = net.spawn(Worker, [], handle)
        net.delay_s = 0.5  # the release and what would cancel it arrive together
        await mesh.cancel_on_leaving.call_one()
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_a_grant_is_given_back_if_its_task_is_cancelled_before_it_goes_on():
    async with wired() as net:
        handle, locks = controller_of(net)
        await net.spawn(Worker, [], handle).cancel_when_granted.call_one()
        await eventually(lambda: locks.snapshot() == {})


@virtual
async def test_a_release_goes_out_though_the_deadline_of_its_call_has_passed():
    async with wired() as net:
        handle, locks = controller_of(net)
        log = []
        with pytest.raises(DeadlineExceeded):
            await net.spawn(Worker, log, handle).options(timeout_s=1.0).leave_late.call_one()
        await eventually(lambda: log == ["leaves"])
        await eventually(lambda: locks.snapshot() == {})
