"""What an actor returned or yielded is its own again: changing it later changes nothing that was answered."""

from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.wire.codec import encode, own_buffers
from miles_agents.wire.transport import ZERO_COPY_BYTES

SIZE = 2 * ZERO_COPY_BYTES


class Keeper(Actor):
    """Keeps what it hands out, and writes to it."""

    def __init__(self):
        self.kept = bytearray(SIZE)

    def write(self):
        self.kept[:] = bytes([self.kept[0] + 1]) * SIZE

    @endpoint
    def get(self):
        return self.kept

    @endpoint
    async def get_async(self):
        return {"kept": [memoryview(self.kept)]}

    @endpoint
    def change(self):
        self.write()

    @endpoint
    def rows(self):
        for _ in range(3):
            yield self.kept
            self.write()

    @endpoint
    async def rows_async(self):
        for _ in range(3):
            yield self.kept
            self.write()


def seen(buffer):
    """All values that occur in it."""
    return sorted(set(bytes(buffer)))


@virtual
async def test_an_answer_under_way_does_not_change_with_what_was_returned():
    async with wired() as net:
        mesh = net.spawn(Keeper)
        futures = [mesh.get.call_one(), mesh.change.call_one(), mesh.get.call_one(), mesh.change.call_one()]
        answers = [await future for future in futures]
        assert [seen(answers[0]), seen(answers[2])] == [[0], [1]]
        one = mesh.get_async.call_one()
        await mesh.change.call_one()
        assert len(seen((await one)["kept"][0])) == 1


@virtual
async def test_items_under_way_do_not_change_either():
    async with wired() as net:
        for name in ("rows", "rows_async"):
            mesh = net.spawn(Keeper)
            assert [seen(item) async for item in mesh.endpoint(name).call_one()] == [[0], [1], [2]]


async def test_an_answer_of_a_thread_does_not_change_either():
    async with wired() as net:
        mesh = net.spawn(Keeper, threads=True)
        for number in range(20):
            future, _ = mesh.get.call_one(), mesh.change.call_one()
            assert seen(await future) == [number]


def test_only_what_can_change_is_copied():
    fixed, loose = bytes(SIZE), bytearray(SIZE)
    _, buffers = encode([fixed, memoryview(fixed), loose, memoryview(loose).toreadonly()])
    owned = own_buffers(buffers)
    assert [view.obj is fixed for view in owned] == [True, True, False, False]
    assert all(type(view.obj) is bytes for view in owned)
    assert owned == buffers
