"""What a worker is told travels whole, and what the ranks of a node have alike travels once."""

from dataclasses import replace

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.rpc.shape import Shape
from miles_agents.worker.spec import WorkerSpec, pack_specs, unpack_specs

BASE = WorkerSpec("run", 2, "m", 0, 100, 1, Shape.of(hosts=1000, gpus=8), sys_path=("a", "b"), env={"A": "1"})


def travelled(specs):
    return unpack_specs(msgpack.unpackb(msgpack.packb(pack_specs(specs))))


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(0, 9),
                "devices": st.lists(st.integers(0, 7)).map(tuple),
                "env": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
                "shape": st.sampled_from([Shape.of(gpus=2), Shape.of(gpus=4).slice(gpus=slice(1, 3))]),
                "cwd": st.sampled_from([None, "/x"]),
                "sys_path": st.sampled_from([(), ("c",)]),
            },
        ),
        min_size=1,
        max_size=5,
    )
)
def test_specs_arrive_as_they_were(changes):
    specs = [replace(BASE, **change) for change in changes]
    assert travelled(specs) == specs


def test_a_rank_more_costs_only_what_is_its_own():
    def size(count):
        specs = [replace(BASE, rank=rank, incarnation=100 + rank, devices=(rank,)) for rank in range(count)]
        return len(msgpack.packb(pack_specs(specs)))

    assert size(8) - size(7) < 60
    shapes = {id(spec.shape) for spec in travelled([BASE, replace(BASE, rank=1)])}
    assert len(shapes) == 1
