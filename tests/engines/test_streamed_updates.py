"""Weight updates by stream from end to end: several ranks, engines and trainers that end in the middle."""

import asyncio
import contextlib
import json
import socket
import threading
from contextlib import AsyncExitStack, closing

import pytest
import torch
from support.fake_engine import FakeModel, fake_engine, loads_into
from support.procs import eventually

from miles.backends.base import ParallelState
from miles.backends.sglang_utils import receive_weights
from miles.backends.weight_update.broadcast_group import BroadcastGroup, Gathering, join_as_engine
from miles.backends.weight_update.bucket_memory import MemoryFile
from miles.backends.weight_update.buckets import Bucket
from miles.backends.weight_update.failures import EnginesMissedUpdate
from miles.backends.weight_update.messages import EngineTarget, WeightUpdate
from miles.backends.weight_update.sender import make_sender
from miles.backends.weight_update.stream import Listener, Place, StreamBroken, connect

CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("method", ["tensor", "broadcast"])
WAIT_S = 60.0


def weights_of(value, count=6):
    return {f"w{number}": torch.full((50,), float(value)) for number in range(count)}


class Engines:
    """Scripted ones, and a sender of a trainer that is this process."""

    def __init__(self, stack, method, *, bucket_bytes=200, timeout_s=WAIT_S):
        self._stack, self.method, self.fakes = stack, method, []
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self.sender, self.version = None, 0

    async def add(self, **options):
        fake = await self._stack.enter_async_context(fake_engine(**options))
        fake.session_open = True
        self.fakes.append(fake)
        return fake

    def update(self, *, new_group=False):
        targets, offset = [], 1
        for index, fake in enumerate(self.fakes):
            targets.append(EngineTarget(f"engine-{index}", fake.url, "", len(fake.models), offset, True))
            offset += len(fake.models)
        self.version += 1
        return WeightUpdate(
            self.version,
            tuple(targets),
            self.method,
            self._bucket_bytes,
            new_group=new_group,
            timeout_s=self._timeout_s,
        )

    async def send(self, weights, **options):
        update = self.update(**options)
        if self.sender is None:
            self.sender = make_sender(ParallelState(), update, CPU)
            self._stack.callback(self.sender.close)
        items = iter(weights.items()) if isinstance(weights, dict) else weights
        async with asyncio.timeout(WAIT_S):
            return await asyncio.to_thread(self.sender.send, update, items)

    def hold(self, value):
        return all(
            len(held) == 6 and all(torch.equal(t, torch.full_like(t, value)) for t in held.values())
            for fake in self.fakes
            for held in (fake.weights, *fake.others)
        )


@METHODS
async def test_each_rank_of_an_engine_is_given_everything(method):
    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        await engines.add(tp_size=2)
        await engines.add()
        await engines.send(weights_of(1), new_group=True)
        assert engines.hold(1)
        seconds = await engines.send(weights_of(2))
        assert engines.hold(2)
        assert 0 < seconds["engine_copy"] <= seconds["engine"] and engines.sender.num_buckets == 6


@METHODS
@pytest.mark.parametrize("fault", ["raise", "close", "die"])
async def test_a_rank_that_ends_in_the_middle_takes_only_its_engine_along(method, fault):
    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        await engines.add()
        await engines.add(tp_size=2)
        await engines.send(weights_of(1), new_group=True)
        engines.fakes[1].faults["bucket"] = [None, None, fault]
        with pytest.raises(EnginesMissedUpdate, match="engine-1 failed while taking weight version 2") as caught:
            await engines.send(weights_of(2))
        assert caught.value.fields["engines"] == ["engine-1"]
        told = {"raise": "these weights are not taken", "close": "the other side is gone", "die": "engine-1"}
        assert told[fault] in caught.value.evidence
        engines.fakes.pop(1)
        assert method == "broadcast" or engines.hold(2)
        await engines.send(weights_of(3))
        assert engines.hold(3)


@METHODS
@pytest.mark.parametrize("after", [0, 3])
async def test_a_trainer_whose_weights_break_ends_the_update_for_engines_and_can_begin_anew(method, after):
    def breaks():
        yield from list(weights_of(2).items())[:after]
        raise ZeroDivisionError("in the trainer")

    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        fake = await engines.add()
        await engines.send(weights_of(1), new_group=True)
        with pytest.raises(ZeroDivisionError, match="in the trainer"):
            await engines.send(breaks())
        assert fake.count("/update_weights_from_tensor") == 2
        await engines.send(weights_of(3))
        assert engines.hold(3)


@METHODS
async def test_an_engine_that_has_begun_anew_is_in_no_group_and_one_is_made(method):
    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        await engines.add()
        await engines.add()
        await engines.send(weights_of(1), new_group=True)
        engines.fakes[1].forget()
        await engines.send(weights_of(2))
        assert engines.hold(2)


class Fused(torch.nn.Module):
    """Keeps q and k in one parameter, half of what is cut, and a padded embedding, as SGLang's classes do."""

    def __init__(self, half):
        super().__init__()
        self.half = slice(10 * half, 10 * half + 10)
        sizes = {"qk": (40, 50), "cut": (10, 50), "embedding": (32, 50), "norm": (3,)}
        for name, size in sizes.items():
            setattr(self, name, torch.nn.Parameter(torch.full(size, 7.0), requires_grad=False))

    def load_weights(self, named):
        for name, loaded in named:
            if name in "qk":
                self.qk.data["qk".index(name) * 20 :][:20].copy_(loaded)
            elif name == "cut":
                self.cut.data.copy_(loaded[self.half])
            else:
                getattr(self, name).data[: len(loaded)].copy_(loaded)
                getattr(self, name).data[len(loaded) :].fill_(0)

    def holds(self, sent):
        padded = torch.cat([sent["embedding"], torch.zeros(2, 50)])
        wanted = {"qk": torch.cat([sent["q"], sent["k"]]), "cut": sent["cut"][self.half], "embedding": padded}
        return all(
            torch.equal(getattr(self, name), tensor) for name, tensor in (wanted | {"norm": sent["norm"]}).items()
        )


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 20000, 9000, 100])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2)])
async def test_large_tensors_come_to_where_the_model_keeps_them_once_that_is_known(sizes, bucket_bytes):
    """Not in an update's first bucket, which comes before it is known whether the model has changed."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm": (3,), "q": (20, 50), "k": (20, 50), "cut": (20, 50), "embedding": (30, 50)}
    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast", bucket_bytes=bucket_bytes)
        for ranks in sizes:
            (await engines.add(tp_size=ranks)).models[:] = map(Fused, range(ranks))
        models = [model for fake in engines.fakes for model in fake.models]
        for number in range(5):
            sent = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
            await engines.send(sent, new_group=not number)
            assert all(model.holds(sent) for model in models)
            plans = [model.weight_receiver._plans for model in models]
            assert all(bool(each.placed) is (number >= 2 and engines.sender.num_buckets > 1) for each in plans)


class Tied(torch.nn.Module):
    """Two names for one parameter, which holds what came last."""

    def __init__(self):
        super().__init__()
        self.both = torch.nn.Parameter(torch.zeros(1 << 20), requires_grad=False)

    def load_weights(self, named):
        for _, loaded in named:
            self.both.data.copy_(loaded)


async def test_a_parameter_that_two_buckets_write_to_holds_what_came_last():
    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast", bucket_bytes=4 << 20)
        fake = await engines.add()
        fake.models[0] = model = Tied()
        for number in range(1, 9):
            sent = {name: torch.full((1 << 20,), sign * float(number)) for name, sign in (("a", -1), ("b", 1))}
            await engines.send(sent, new_group=number == 1)
            assert model.both.eq(number).all(), number


async def test_a_group_is_kept_as_long_as_all_are_in_it():
    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast")
        fake = await engines.add()

        def group():
            return fake.models[0].weight_receiver.group_name

        await engines.send(weights_of(1), new_group=True)
        first = group()
        await engines.send(weights_of(2))
        assert first and group() == first
        await engines.send(weights_of(3), new_group=True)
        assert group() not in ("", first) and engines.hold(3)


@METHODS
async def test_an_engine_that_answers_without_having_connected_is_named(method):
    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        await engines.add()
        (await engines.add()).script = lambda order: None
        with pytest.raises(EnginesMissedUpdate, match="engine-1 failed") as caught:
            await engines.send(weights_of(1), new_group=True)
        assert "without taking weights" in caught.value.evidence


def scripted(order, serve, **hello):
    """An engine's rank that connects as it should, and goes on as ``serve`` does."""
    said = {"engine": order["engine"], "rank": order["rank"], "group": "", **hello}
    with closing(connect(Place(*order["place"]), said, WAIT_S)) as line, contextlib.suppress(StreamBroken):
        serve(line)


@METHODS
@pytest.mark.parametrize("hello", [{"engine": "engine-7"}, {"rank": 1}])
async def test_an_engine_that_says_it_is_another_is_none_of_ours(method, hello):
    async with AsyncExitStack() as stack:
        engines = Engines(stack, method)
        (await engines.add()).script = lambda order: scripted(order, lambda line: line.receive(), **hello)
        with pytest.raises(EnginesMissedUpdate, match="engine-0 failed"):
            await engines.send(weights_of(1), new_group=True)


@pytest.mark.parametrize("says", [{"error": "no route to the trainer"}, None])
async def test_an_engine_that_does_not_join_is_named_and_the_others_are_not(says):
    def serve(line):
        assert line.receive()["say"] == "join"
        if says is not None:
            line.send(says)

    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast")
        await engines.add()
        await engines.add()
        engines.fakes[1].script = lambda order: scripted(order, serve)
        with pytest.raises(EnginesMissedUpdate) as caught:
            await engines.send(weights_of(1), new_group=True)
        assert caught.value.fields["engines"] == ["engine-1"]
        engines.fakes[1].script = None
        await engines.send(weights_of(2), new_group=True)
        assert engines.hold(2)


def joined(line, rank=None):
    """The group that a scripted engine was asked to join."""
    found = line.receive()
    place = (found["rank"] if rank is None else rank, found["size"])
    return join_as_engine(found["name"], (found["host"], found["port"]), place, CPU)


async def test_a_broadcast_that_breaks_without_a_word_is_never_taken_for_done():
    """The engine has left the group, and does not say that it has failed."""

    def serve(line):
        group = joined(line)
        line.send({"said": "joined"})
        line.receive()
        group.close()
        while True:
            line.receive()

    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast", bucket_bytes=1 << 25, timeout_s=2.0)
        (await engines.add()).script = lambda order: scripted(order, serve)
        with pytest.raises(EnginesMissedUpdate) as caught:
            await engines.send({f"large{number}": torch.zeros(8 << 20) for number in range(4)}, new_group=True)
        assert "a broadcast broke off" in caught.value.evidence


async def test_an_engine_that_was_cut_off_says_so_and_is_not_named():
    """Data may go from one engine to the other: one that ends takes the broadcast from those behind it."""

    def serve(line):
        group = joined(line)
        line.send({"said": "joined"})
        line.receive()
        group.close()
        line.send({"error": "this one is the cause"})

    async with AsyncExitStack() as stack:
        engines = Engines(stack, "broadcast")
        for _ in range(3):
            await engines.add()
        engines.fakes[0].script = lambda order: scripted(order, serve)
        with pytest.raises(EnginesMissedUpdate, match="this one is the cause") as caught:
            await engines.send(weights_of(1), new_group=True)
        assert caught.value.fields["engines"] == ["engine-0"]


class TrainerSide:
    """A trainer's end of one engine's line, driven by hand."""

    def __init__(self, stack):
        self.held = {}
        self.model = FakeModel(loads_into(self.held))
        stack.callback(receive_weights.forget, self.model)
        self._stack = stack

    @contextlib.asynccontextmanager
    async def engine(self):
        """The line to it; at the end it has returned from what SGLang calls."""
        with Listener("127.0.0.1", WAIT_S) as listener:
            place = [listener.place.host, listener.place.port, listener.place.token]
            order = {"place": place, "engine": "engine-0", "rank": 0, "timeout_s": WAIT_S, "method": "tensor"}
            loading = asyncio.create_task(
                asyncio.to_thread(receive_weights.load, self.model, [(json.dumps(order), torch.empty(0))])
            )
            found = []
            await eventually(lambda: found or found.extend(listener.accept(0.0) or ()))
        with closing(found[0]) as line:
            yield line, found[1]
        async with asyncio.timeout(WAIT_S):
            await loading

    def bucket(self, value):
        memory, bucket = MemoryFile(), Bucket(1 << 20)
        self._stack.callback(memory.close)
        whole = memory.at_least(1 << 20)
        for name, tensor in weights_of(value).items():
            entry = bucket.add(name, tensor)
            whole[entry.start : entry.start + entry.num_bytes].view(torch.float32).copy_(tensor)
        return {"say": "bucket", "entries": [entry.as_plain() for entry in bucket.entries]}, memory.describe()

    async def whole_update(self, value):
        async with self.engine() as (line, _):
            message, memory = self.bucket(value)
            line.send(message | {"number": 0, "memory": memory})
            line.send({"say": "end"})
            said = [await asyncio.to_thread(line.receive) for _ in range(2)]
        assert [message["said"] for message in said] == ["loaded", "done"]
        assert all(torch.equal(tensor, torch.full((50,), float(value))) for tensor in self.held.values())


@pytest.mark.parametrize(
    ("stays", "told"), [((1,), (0, 0)), ((1, 1), (0, 1, 1)), ((1, 0), (0, 1)), ((0, 1), (0, 1, 1))]
)
async def test_memory_that_stays_is_loaded_at_once_and_waited_for_in_the_end(stays, told):
    """What comes after it and does not stay is waited for, and so is what came before."""
    async with AsyncExitStack() as stack:
        side = TrainerSide(stack)
        async with side.engine() as (line, _):
            for number, value in enumerate(stays):
                message, memory = side.bucket(number)
                line.send(message | {"number": number, "memory": memory} | ({"stays": True} if value else {}))
            line.send({"say": "end"})
            said = [await asyncio.to_thread(line.receive) for _ in range(len(told) + 1)]
        assert [message.get("number") for message in said] == [*told, None] and said[-1]["said"] == "done"
        assert all(torch.equal(held, torch.full((50,), float(len(stays) - 1))) for held in side.held.values())


async def test_a_trainer_that_ends_in_the_middle_leaves_an_engine_that_serves_on(caplog):
    async with AsyncExitStack() as stack:
        side = TrainerSide(stack)
        async with side.engine() as (line, _):
            message, memory = side.bucket(1)
            line.send(message | {"number": 0, "memory": memory})
            assert (await asyncio.to_thread(line.receive))["said"] == "loaded"
        assert "weights were not received" in caplog.text
        await side.whole_update(2)


async def test_an_engine_does_not_look_for_a_group_that_its_trainer_has_given_up(caplog):
    """Another engine has failed meanwhile, say: torch would go on to look for the group for minutes."""
    async with AsyncExitStack() as stack:
        side = TrainerSide(stack)
        async with side.engine() as (line, _):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            line.send({"say": "join", "name": "gone", "host": "127.0.0.1", "port": port, "rank": 1, "size": 2})
            await eventually(lambda: "join-group" in {thread.name for thread in threading.enumerate()})
        assert "somebody failed before all were there" in caplog.text
        await side.whole_update(2)


@pytest.mark.parametrize("unread", [0, 2])
async def test_a_trainer_that_ends_in_a_broadcast_does_not_keep_an_engine(unread, caplog):
    """Also where messages that it sent before are still to be read."""
    async with AsyncExitStack() as stack:
        side = TrainerSide(stack)
        async with side.engine() as (line, hello):
            assert hello["group"] == ""
            gathering = Gathering("127.0.0.1", 2, CPU)
            where = {"name": gathering.name, "host": "127.0.0.1", "port": gathering.port, "rank": 1, "size": 2}
            line.send({"say": "join", **where})
            group = await asyncio.to_thread(gathering.wait, lambda: False)
            assert isinstance(group, BroadcastGroup) and (await asyncio.to_thread(line.receive))["said"] == "joined"
            message, _ = side.bucket(1)
            for number in range(2 + unread):
                line.send(message | {"number": number, "num_bytes": 4096, "packed": 4096, "room": 4096, "cut": [1, 1]})
            del gathering
            line.close()
            await eventually(lambda: "end-group" in {thread.name for thread in threading.enumerate()})
            group.close()  # what ends the broadcast, and with it the engine's leaving
        assert "the trainer has ended a broadcast" in caplog.text
        await side.whole_update(2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"say": "dance"}, "'dance'"),
        ({"memory": {"pid": 1, "fd": 9999, "inode": 0, "size": 1}}, "9999"),
        ({"entries": [["w", "float99", [1], 0, 4, None]]}, "float99"),
        ({"entries": None}, "TypeError"),
        ({"num_bytes": 8, "room": 8}, "no process group"),
    ],
)
async def test_what_an_engine_cannot_do_is_told_and_ends_nothing_but_the_update(change, told):
    async with AsyncExitStack() as stack:
        side = TrainerSide(stack)
        async with side.engine() as (line, _):
            message, memory = side.bucket(1)
            whole = message | {"number": 0} | ({} if "room" in change else {"memory": memory}) | change
            line.send(whole)
            with pytest.raises(StreamBroken) as caught:
                await asyncio.to_thread(line.receive)
            assert told in str(caught.value) or change.get("say") == "dance"
        await side.whole_update(2)


@pytest.mark.long
@METHODS
async def test_an_update_may_take_longer_than_each_of_its_parts(method):
    def slowly():
        for item in weights_of(1).items():
            threading.Event().wait(1.0)
            yield item

    async with AsyncExitStack() as stack:
        engines = Engines(stack, method, timeout_s=3.0)
        await engines.add()
        seconds = await engines.send(slowly(), new_group=True)
        assert engines.hold(1) and seconds["total"] > 3.0
