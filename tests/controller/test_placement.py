"""Placement: packing order, services over nodes, colocation, spares, and errors that show the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.node_info import BadNodeInfo, Gpu, NodeInfo, default_cpu_slots
from miles_controller.placement import (
    BadPlacementRequest,
    InfeasiblePlacement,
    Inventory,
    Request,
    Slot,
    place,
    replace,
)
from miles_controller.placement_table import ranges, render_inventory, render_placement


def gpu_node(name, gpus=8):
    cards = tuple(Gpu(index, f"GPU-{name}-{index}", "H100", 80 << 30, index // 4) for index in range(gpus))
    return NodeInfo(name, f"{name}.cluster", ("10.0.0.1",), cards, 8, 64, 1 << 40, "3.12.3", "Linux")


def cpu_node(name, slots=8):
    return NodeInfo(name, name, ("127.0.0.1",), (), slots, 2, 1 << 34, "3.12.3", "Linux")


def cluster(*gpus, **state):
    return Inventory.of([gpu_node(f"n{index}", count) for index, count in enumerate(gpus)], **state)


def where(placement, name):
    """Node and devices of each rank; several for ranks that span nodes."""
    return [[(slot.node, slot.devices) for slot in slots] for slots in placement.slots[name]]


def test_a_node_is_filled_before_the_next():
    placement = place(cluster(4, 4), [Request("train", 6)])
    assert where(placement, "train") == [[("n0", (i,))] for i in range(4)] + [[("n1", (i,))] for i in range(2)]
    assert placement.slots["train"][5] == (Slot("n1", (1,), local_rank=1, node_rank=1),)
    assert (placement.head, placement.nodes, placement.spares) == ("n0", ("n0", "n1"), ())


def test_a_rank_never_straddles_nodes():
    placement = place(cluster(3, 3), [Request("engine", 2, 2)])
    assert where(placement, "engine") == [[("n0", (0, 1))], [("n1", (0, 1))]]


def test_used_and_failed_devices_are_left_out():
    inventory = cluster(4, used={("n0", 1): "other"}, failed=[("n0", 2)])
    assert where(place(inventory, [Request("train", 2)]), "train") == [[("n0", (0,))], [("n0", (3,))]]


def test_requests_follow_one_another():
    placement = place(cluster(4, 4), [Request("train", 3), Request("engine", 2, 2)])
    assert where(placement, "engine") == [[("n1", (0, 1))], [("n1", (2, 3))]]


def test_a_second_attempt_serves_the_most_constrained_first():
    placement = place(cluster(4, 4), [Request("free", 4), Request("bound", 4, nodes=("n0",))])
    assert {slot.node for slots in placement.slots["bound"] for slot in slots} == {"n0"}
    assert {slot.node for slots in placement.slots["free"] for slot in slots} == {"n1"}


def test_a_service_larger_than_a_node_takes_whole_nodes():
    placement = place(cluster(8, 8, 8, used={("n0", 0): "other"}), [Request("engine", 1, 16, kind="service")])
    (slots,) = placement.slots["engine"]
    assert [(slot.node, len(slot.devices), slot.node_rank) for slot in slots] == [("n1", 8, 0), ("n2", 8, 1)]
    assert placement.head == "n1"


@pytest.mark.parametrize("asked", [Request("engine", 1, 12, kind="service"), Request("engine", 1, 16)])
def test_only_services_span_and_only_whole_nodes(asked):
    with pytest.raises(InfeasiblePlacement):
        place(cluster(8, 8), [asked])


def test_colocated_engines_cover_the_devices_of_their_trainers():
    requests = [Request("engine", 2, 4, colocate_with="train", kind="service"), Request("train", 8)]
    placement = place(cluster(8), requests)
    assert where(placement, "engine") == [[("n0", (0, 1, 2, 3))], [("n0", (4, 5, 6, 7))]]
    assert set(placement.used().values()) == {"engine+train"}


def test_a_colocated_service_may_cover_whole_nodes_but_not_parts_of_two():
    big = Request("engine", 1, 8, colocate_with="train", kind="service")
    assert [slot.node for slot in place(cluster(4, 4), [Request("train", 8), big]).slots["engine"][0]] == ["n0", "n1"]
    with pytest.raises(InfeasiblePlacement, match="it must cover whole nodes"):
        place(cluster(6, 6), [Request("train", 12), Request("engine", 3, 4, colocate_with="train", kind="service")])
    with pytest.raises(InfeasiblePlacement, match="cannot straddle"):
        place(cluster(4, 4), [Request("train", 8), Request("other", 1, 8, colocate_with="train")])


def test_ranks_without_devices_go_to_the_head():
    inventory = cluster(2, 2, used={("n0", 0): "x", ("n0", 1): "x"})
    placement = place(inventory, [Request("manager", 1, 0), Request("train", 2)])
    assert where(placement, "manager") == [[("n1", ())]]
    assert placement.head == "n1"


def test_at_most_so_many_ranks_on_a_node():
    placement = place(cluster(4, 4), [Request("probe", 2, max_ranks_per_node=1)])
    assert where(placement, "probe") == [[("n0", (0,))], [("n1", (0,))]]
    with pytest.raises(InfeasiblePlacement, match=r"room for 2 ranks \(at most 1 on a node\)"):
        place(cluster(4, 4), [Request("probe", 3, max_ranks_per_node=1)])


def test_a_kind_of_device_can_be_asked_for():
    inventory = Inventory.of([cpu_node("head"), gpu_node("n0")])
    assert where(place(inventory, [Request("train", 1, device_kind="gpu")]), "train") == [[("n0", (0,))]]


def test_oversubscription_shares_devices_and_keeps_ranks_together():
    inventory = Inventory.of([cpu_node("a", 2), cpu_node("b", 2)], used={("b", 1): "other"})
    placement = place(inventory, [Request("train", 6, oversubscribe=True)])
    nodes = [slots[0].node for slots in placement.slots["train"]]
    assert nodes == ["a"] * 4 + ["b"] * 2
    assert [slots[0].devices for slots in placement.slots["train"]] == [(0,), (1,), (0,), (1,), (0,), (0,)]
    assert placement.shared == ("train",)
    assert place(inventory, [Request("train", 3, oversubscribe=True)]).shared == ()


def test_spares_are_whole_nodes_from_the_end():
    inventory = cluster(2, 2, 2, 2, failed=[("n3", 0)])
    placement = place(inventory, [Request("train", 3)], num_spares=1)
    assert (placement.spares, placement.nodes) == (("n2",), ("n0", "n1"))
    with pytest.raises(InfeasiblePlacement, match="4 spare nodes asked, 3 nodes are wholly free"):
        place(inventory, [Request("train", 1)], num_spares=4)


def test_what_does_not_fit_is_told_with_all_problems_and_tables():
    inventory = cluster(4, 4, used={("n0", 0): "other", ("n0", 1): "other"}, failed=[("n1", 3)])
    with pytest.raises(InfeasiblePlacement) as caught:
        place(inventory, [Request("train", 12), Request("engine", 1, 4), Request("small", 1)])
    evidence = caught.value.evidence
    assert "train: 12 devices asked (12 ranks x 1), 5 free on 2 nodes; the largest single node has 3 free" in evidence
    assert "engine: 4 devices asked (1 ranks x 4)" in evidence
    assert "small: 1 devices" not in evidence
    assert "other: 0-1; small: 2" in evidence
    assert all(len(line) <= 100 for line in evidence.splitlines() if line.startswith(("|", "+")))
    assert len(caught.value.fields["problems"]) == 2


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ([], "nothing is asked for"),
        ([Request("a", 1), Request("a", 1)], "a is asked for twice"),
        ([Request("a", 0)], "num_ranks=0 is below 1"),
        ([Request("a", 1, -1)], "devices_per_rank=-1"),
        ([Request("a", 1, nodes=("m0",))], "no node is called 'm0'"),
        ([Request("train", 1), Request("b", 1, colocate_with="trian")], "did you mean 'train'"),
        ([Request("a", 1, colocate_with="b"), Request("b", 1, colocate_with="a")], "b: colocate_with leads back"),
    ],
)
def test_requests_that_make_no_sense_are_refused(requests, problem):
    with pytest.raises(BadPlacementRequest, match=problem):
        place(cluster(2), requests)


def test_only_the_ranks_of_lost_nodes_move_and_colocation_stays():
    requests = [Request("train", 6), Request("engine", 3, 2, colocate_with="train"), Request("manager", 1, 0)]
    before = place(cluster(2, 2, 2, 2, 2), requests, num_spares=2)
    after = replace(before, {"n0", "n3"}, cluster(2, 2, 2, 2, 2))
    moved = {"n0": "n4", "n1": "n1", "n2": "n2"}
    for name in ("train", "engine", "manager"):
        assert where(after, name) == [
            [(moved[node], devices) for node, devices in slots] for slots in where(before, name)
        ]
    assert (after.head, after.spares) == ("n4", ())
    assert after.slots["train"][0][0].node_rank == 0


def test_a_lost_node_without_a_fitting_spare_is_told():
    before = place(cluster(4, 4, 2), [Request("train", 8)], num_spares=1)
    with pytest.raises(InfeasiblePlacement, match="1 nodes to replace, 0 of 1 spare nodes fit") as caught:
        replace(before, {"n1"}, cluster(4, 4, 2))
    assert "n1 is lost with 4 devices in use by train" in caught.value.evidence


def test_spares_are_matched_so_that_all_find_one():
    # The large spare would do for both lost nodes, the small one only for n0.
    before = place(cluster(2, 4, 4, 2), [Request("a", 2), Request("b", 4, nodes=("n1", "n2"))], num_spares=2)
    after = replace(before, {"n0"}, cluster(2, 4, 4, 2))
    assert after.head == "n2"
    after = replace(before, {"n0", "n1"}, cluster(2, 4, 4, 2))
    assert {slot.node for slots in after.slots["b"] for slot in slots} == {"n2"}
    assert {slot.node for slots in after.slots["a"] for slot in slots} == {"n3"}


def test_tables_show_who_has_what():
    placement = place(cluster(4, 4), [Request("train", 3), Request("manager", 1, 0)], num_spares=1)
    table = render_placement(placement)
    assert "n0 (head)" in table
    assert "0-2" in table
    assert "n1 (spare)" in table
    assert "train: 0-2" in render_inventory(cluster(4, 4).with_used(placement.used()))
    assert ranges([5, 0, 1, 2, 2]) == "0-2,5"
    narrow = render_inventory(cluster(4), width=40)
    assert max(map(len, narrow.splitlines())) <= 40


def test_node_info_survives_the_way_through_plain_values():
    for node in (gpu_node("n0"), cpu_node("n1")):
        assert NodeInfo.from_plain(node.to_plain()) == node
    assert (gpu_node("n0", 2).devices, cpu_node("n1", 3).devices) == ((0, 1), (0, 1, 2))
    assert (default_cpu_slots(2), default_cpu_slots(64)) == (8, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"node": ""},
        {"cores": True},
        {"memory_bytes": -1},
        {"addresses": "10.0.0.1"},
        {"addresses": [1]},
        {"gpus": [{}]},
        {"gpus": [gpu_node("n").gpus[0].to_plain()] * 2},
        {"python": None},
    ],
)
def test_a_node_that_describes_itself_badly_is_refused(change):
    with pytest.raises(BadNodeInfo):
        NodeInfo.from_plain({**gpu_node("n0").to_plain(), **change})
    with pytest.raises(BadNodeInfo):
        NodeInfo.from_plain([])


clusters = st.lists(st.integers(1, 8), min_size=1, max_size=5)


@st.composite
def worlds(draw):
    """A cluster in some state, and requests with devices of their own, some of them colocated upon."""
    sizes = draw(clusters)
    devices = [(f"n{node}", device) for node, size in enumerate(sizes) for device in range(size)]
    state = {"used": dict.fromkeys(draw(st.sets(st.sampled_from(devices), max_size=4)), "other")}
    state["failed"] = draw(st.sets(st.sampled_from(devices), max_size=2))
    requests = []
    for index in range(draw(st.integers(1, 3))):
        names = [f"n{node}" for node in range(len(sizes))]
        allowed = draw(st.none() | st.sets(st.sampled_from(names), min_size=1).map(lambda some: tuple(sorted(some))))
        limit = draw(st.none() | st.integers(1, 4))
        size, kind = draw(st.integers(0, 10)), draw(st.sampled_from(["ranks", "service"]))
        requests.append(
            Request(f"r{index}", draw(st.integers(1, 6)), size, kind=kind, max_ranks_per_node=limit, nodes=allowed)
        )
    if draw(st.booleans()):
        requests.append(Request("shares", 1, draw(st.integers(0, 4)), colocate_with="r0", kind="service"))
    return cluster(*sizes, **state), requests, draw(st.integers(0, 1))


@given(worlds())
def test_a_placement_keeps_every_promise(world):
    inventory, requests, num_spares = world
    try:
        placement = place(inventory, requests, num_spares=num_spares)
    except InfeasiblePlacement:
        return
    assert placement == place(inventory, requests, num_spares=num_spares)
    taken = []
    order = [node.name for node in inventory.nodes]
    for request in requests:
        ranks = placement.slots[request.name]
        assert len(ranks) == request.num_ranks
        for slots in ranks:
            assert sum(len(slot.devices) for slot in slots) == request.devices_per_rank
            assert len({slot.node for slot in slots}) == len(slots)
            for slot in slots:
                node = inventory.get(slot.node)
                assert set(slot.devices) <= set(node.free)
                assert request.nodes is None or slot.node in request.nodes
                assert slot.node not in placement.spares
                assert len(slots) == 1 or slot.devices == node.info.devices
        if request.colocate_with is None:
            taken += [(slot.node, device) for slots in ranks for slot in slots for device in slot.devices]
            on_node = [slots[0].node for slots in ranks]
            if request.kind == "ranks" and request.devices_per_rank:
                assert [order.index(node) for node in on_node] == sorted(order.index(node) for node in on_node)
            limit = request.max_ranks_per_node
            assert limit is None or all(on_node.count(node) <= limit for node in on_node)
        else:
            base = {
                (slot.node, device)
                for slots in placement.slots[request.colocate_with]
                for slot in slots
                for device in slot.devices
            }
            assert {(slot.node, device) for slots in ranks for slot in slots for device in slot.devices} <= base
    assert len(taken) == len(set(taken))
    assert len(placement.spares) == num_spares


@given(clusters, st.integers(1, 20), st.integers(1, 8))
def test_one_request_fits_exactly_if_the_count_says_so(sizes, num_ranks, devices_per_rank):
    room = sum(size // devices_per_rank for size in sizes)
    try:
        place(cluster(*sizes), [Request("train", num_ranks, devices_per_rank)])
        fits = True
    except InfeasiblePlacement:
        fits = False
    assert fits == (num_ranks <= room)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.data())
def test_replacing_moves_exactly_what_was_lost(nodes, devices, num_spares, data):
    inventory = cluster(*[devices] * (nodes + num_spares))
    before = place(inventory, [Request("train", nodes * devices)], num_spares=num_spares)
    lost = data.draw(st.sets(st.sampled_from(before.nodes), min_size=1))
    if len(lost) > num_spares:
        with pytest.raises(InfeasiblePlacement):
            replace(before, lost, inventory)
        return
    after = replace(before, lost, inventory)
    for old, new in zip(before.slots["train"], after.slots["train"], strict=True):
        assert (old == new) == (old[0].node not in lost)
    assert not set(after.nodes) & (lost | set(after.spares))
    assert len(after.used()) == nodes * devices


def test_slices_lie_on_one_node_each_and_nodes_that_cannot_hold_one_are_skipped():
    placement = place(cluster(2, 4, 2, 6), [Request("train", 8, ranks_per_node=4)])
    assert [slots[0].node for slots in placement.slots["train"]] == ["n1"] * 4 + ["n3"] * 4
    with pytest.raises(InfeasiblePlacement, match=r"room for 4 ranks \(exactly 4 on each node\)"):
        place(cluster(2, 4, 2), [Request("train", 8, ranks_per_node=4)])
    with pytest.raises(BadPlacementRequest, match="8 ranks are no multiple of 3"):
        place(cluster(8), [Request("train", 8, ranks_per_node=3)])


def test_slices_that_may_share_devices_still_have_a_node_each():
    placement = place(cluster(2, 4), [Request("train", 8, ranks_per_node=4, oversubscribe=True)])
    assert [slots[0].node for slots in placement.slots["train"]] == ["n0"] * 4 + ["n1"] * 4
    assert placement.shared == ("train",)


def test_colocated_slices_must_come_out_as_asked():
    with pytest.raises(InfeasiblePlacement, match="2 ranks on n0, exactly 1 are asked for"):
        place(cluster(2), [Request("train", 2), Request("engine", 2, colocate_with="train", ranks_per_node=1)])
