"""Handles: slices, options, wire form, and the verbs that are refused where they cannot work."""

import pytest
from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.errors import NotAnActorProcess, NotAnEndpoint, WrongVerb
from miles_agents.rpc.mesh import ActorMesh, BadHandle, MeshInfo
from miles_agents.rpc.shape import Shape, ValueMesh
from miles_agents.wire.codec import decode, encode


class Worker(Actor):
    @endpoint
    def train(self, step): ...

    @endpoint
    def items(self):
        yield 1

    @endpoint(thread="io")
    def progress(self): ...


@virtual
async def test_a_handle_knows_its_ranks_and_endpoints():
    async with wired() as net:
        mesh = net.spawn(Worker, name="trainers", hosts=2, gpus=3)
        assert len(mesh) == 6
        assert mesh.name == "trainers"
        assert repr(mesh) == "<ActorMesh trainers (hosts=2, gpus=3)>"
        assert set(mesh.endpoints) == {"train", "items", "progress"}
        assert repr(mesh.train) == "<Endpoint trainers.train>"
        part = mesh.slice(hosts=1).flatten("ranks")
        assert [(t.rank, t.position) for t in part.targets()] == [(3, 0), (4, 1), (5, 2)]
        assert part.shape.extent.dims == ("ranks",)
        assert [t.incarnation for t in part.targets()] == [net.address(mesh, rank).incarnation for rank in (3, 4, 5)]
        assert repr(mesh.endpoint("progress")) == repr(mesh.progress)


@virtual
async def test_a_handle_arrives_as_it_was_sent():
    async with wired() as net:
        mesh = net.spawn(Worker, name="trainers", hosts=2, gpus=2)
        part = mesh.slice(gpus=1)
        body, buffers = encode({"to": part})
        arrived = decode(body, buffers, libraries="opaque")["to"]
        assert isinstance(arrived, ActorMesh)
        assert arrived.targets() == part.targets()
        assert arrived.shape == part.shape
        assert arrived.endpoints == mesh.endpoints
        with pytest.raises(NotAnActorProcess, match="where no runtime is"):
            arrived.train.call(1)


@virtual
async def test_the_handle_of_a_large_mesh_is_small_and_exact_also_after_restarts():
    async with wired() as net:
        mesh = net.spawn(Worker)
        shape = Shape.of(hosts=1000, gpus=8)
        lives = {rank: 5000 + rank for rank in range(8000)}
        lives.update({rank: 20_000 + rank for rank in range(80, 88)} | {rank: 30_000 - rank for rank in (90, 91)})
        large = ActorMesh(MeshInfo(2, "large", lives, mesh.endpoints), shape)
        body, _ = encode({"to": large})
        assert len(body) < 500
        assert decode(body, [], libraries="opaque")["to"].targets() == large.targets()
        some = large.slice(gpus=3)
        assert ActorMesh.from_plain(some.to_plain()).targets() == some.targets()


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": "x"},
        {"endpoints": [[1]]},
        {"lives": [1]},
        {"lives": None},
        {"lives": [["x", 1, 1]]},
        {"lives": []},
        {"lives": [[0, 1, 2]]},
        {"lives": [[0, 1, 2], [0, 1, -1]]},
        {"lives": [[0, 1, 10**12]]},
    ],
)
@virtual
async def test_a_handle_that_makes_no_sense_is_refused(change):
    async with wired() as net:
        plain = net.spawn(Worker).to_plain()
        with pytest.raises(BadHandle, match="a handle arrived that is none"):
            ActorMesh.from_plain({**plain, **change})


@virtual
async def test_an_unknown_endpoint_names_the_nearest():
    async with wired() as net:
        mesh = net.spawn(Worker, name="trainers")
        with pytest.raises(NotAnEndpoint, match="trainers has no endpoint 'trian'") as caught:
            mesh.trian
        assert caught.value.advice == "Did you mean 'train'?"
        assert "items, progress, train" in caught.value.evidence
        assert not hasattr(mesh, "nothing")
        assert not hasattr(mesh, "_private")
        with pytest.raises(NotAnEndpoint) as caught:
            mesh.close
        assert "@endpoint" in caught.value.advice


@virtual
async def test_verbs_that_cannot_work_are_refused_before_anything_is_sent():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        with pytest.raises(WrongVerb, match="called like a function"):
            mesh.train(1)
        with pytest.raises(WrongVerb, match="which has 2 ranks"):
            mesh.train.call_one(1)
        for verb in ("call", "broadcast", "choose"):
            with pytest.raises(WrongVerb, match="generator endpoint"):
                getattr(mesh.items, verb)()
        assert net.sent == []
        assert len(net.hub.calls) == 0


@virtual
async def test_options_add_up_and_leave_the_handle_as_it_was():
    async with wired() as net:
        mesh = net.spawn(Worker, ranks=2)
        both = mesh.options(timeout_s=3.0).options(return_exceptions=True).slice(ranks=0)
        assert (both._options.timeout_s, both._options.return_exceptions) == (3.0, True)
        assert (mesh._options.timeout_s, mesh._options.return_exceptions) == (None, False)
        assert both.options(return_exceptions=False)._options.timeout_s == 3.0


def test_a_handle_without_a_runtime_says_so():
    mesh = ActorMesh.from_plain(
        {"mesh": 2, "name": "m", "lives": [[0, 1, 1]], "shape": Shape.of(ranks=1).to_plain(), "endpoints": []}
    )
    with pytest.raises(NotAnActorProcess, match="where no runtime is"):
        mesh.anything.call()


def test_what_a_call_gave_can_be_handed_on():
    part = Shape.of(hosts=2, gpus=3).slice(gpus=slice(1, 3))
    values = ValueMesh(part, (1, "two", [3], {"four": 4}))
    point = part.extent.point(2)
    body, buffers = encode([values, part, point])
    assert decode(body, buffers, libraries="opaque") == [values, part, point]
    assert decode(body, buffers, libraries="opaque")[0].at(hosts=1, gpus=1) == {"four": 4}
