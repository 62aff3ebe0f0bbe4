"""Meshes come and go for as long as a process lives; what a node keeps of them does not grow with their number."""

from support.links import virtual

from miles_agents.rpc.node import MAX_WINDOWS, RpcNode
from miles_agents.wire import envelope as wire
from miles_agents.wire.envelope import Address, Target

HOME = Address(0, 0, 1)
CALLEE = Target(0, 50, 0)


class Nobody:
    """Waits for the answer of one call and forgets it."""

    fail_fast = True

    def on_value(self, position, value): ...
    def on_error(self, position, error): ...
    def on_item(self, position, item): ...
    def on_end(self, position): ...
    def on_settled(self): ...


def a_node():
    sent = []
    node = RpcNode(HOME, "home", sent.append)

    def call(mesh, **options):
        node.begin(mesh, [CALLEE], "work", ((), {}), Nobody(), **options)
        return sent[-1] if sent else None

    return node, call


def answer(node, request):
    node.deliver(request.answer(wire.REPLY, Address(request.mesh, 0, 50), b"\xc0"))


@virtual
async def test_windows_of_meshes_with_nothing_open_are_dropped_and_others_kept():
    node, call = a_node()
    held = call(5)
    kept = node._windows[5, "main"]
    for mesh in range(10, 10 + 3 * MAX_WINDOWS):
        answer(node, call(mesh))
    assert len(node._windows) <= MAX_WINDOWS
    assert node._windows[5, "main"] is kept
    assert not kept.is_idle
    answer(node, held)
    assert kept.is_idle
    assert len(node.calls) == 0


@virtual
async def test_calls_that_expire_unsent_leave_no_window_each():
    node, call = a_node()
    for mesh in range(10, 10 + 2 * MAX_WINDOWS):
        call(mesh, timeout_s=-1.0)
    assert len(node._windows) <= MAX_WINDOWS
