"""Placements in use, as values: devices of the same kind, sharing, meshes that leave and come again."""

import dataclasses

import pytest

from miles_agents.node_info import Gpu
from miles_agents.simulation import simulated_info
from miles_controller.gangs import Gangs
from miles_controller.placement import InfeasiblePlacement, Inventory, Request, place


def cpu_node(name, slots):
    return simulated_info(name, cpu_slots=slots)


def gpu_node(name, gpus):
    cards = tuple(Gpu(index, f"GPU-{name}-{index}", "H100", 80 << 30) for index in range(gpus))
    return dataclasses.replace(simulated_info(name), gpus=cards)


def joined(infos, requests, names, **options):
    gangs = Gangs()
    placement = place(Inventory.of(infos), requests, **options)
    return gangs, placement, [gangs.join(placement, name) for name in names][-1]


def nodes_of(gang, name):
    return [slot.node for parts in gang.current.slots[name] for slot in parts]


def test_ranks_move_to_devices_of_the_same_kind_only():
    infos = [gpu_node("g0", 2), cpu_node("c0", 8), gpu_node("g1", 2)]
    gangs, _, gang = joined(infos, [Request("m", 2)], ["m"])
    gangs.move(gang, "g0", "gpu", infos[1:])
    assert nodes_of(gang, "m") == ["g1", "g1"]
    with pytest.raises(InfeasiblePlacement):
        gangs.move(gang, "g1", "gpu", infos[1:2])
    assert nodes_of(gang, "m") == ["g1", "g1"]


def test_a_spare_of_another_kind_stays_kept():
    infos = [gpu_node("g0", 2), gpu_node("g1", 2), cpu_node("c0", 8)]
    gangs, _, gang = joined(infos, [Request("m", 2)], ["m"], num_spares=1)
    gangs.move(gang, "g0", "gpu", infos[1:])
    assert nodes_of(gang, "m") == ["g1", "g1"]
    assert gang.current.spares == ("c0",)
    assert gangs.inventory(infos).get("c0").free == ()


def test_ranks_stay_on_the_nodes_that_they_may_use():
    infos = [cpu_node("c0", 2), cpu_node("c1", 2), cpu_node("c2", 2)]
    gangs, _, gang = joined(infos, [Request("m", 1, nodes=("c0", "c2"))], ["m"])
    gangs.move(gang, "c0", "cpu", infos[1:])
    assert nodes_of(gang, "m") == ["c2"]


def test_ranks_that_may_share_devices_move_also_where_nothing_is_free():
    infos = [cpu_node("c0", 2), cpu_node("c1", 2)]
    gangs, _, gang = joined(infos, [Request("m", 4, oversubscribe=True)], ["m"])
    gangs.move(gang, "c0", "cpu", infos[1:])
    assert nodes_of(gang, "m") == ["c1"] * 4
    assert [slot.local_rank for (slot,) in gang.current.slots["m"]] == [2, 3, 0, 1]


def test_a_mesh_that_left_asks_for_nothing_and_may_come_again():
    infos = [cpu_node("c0", 4), cpu_node("c1", 2)]
    gangs, placement, gang = joined(infos, [Request("a", 2), Request("b", 2)], ["a", "b"])
    gangs.leave(gang, "b")
    assert gangs.inventory(infos).get("c0").free == (2, 3)
    gangs.move(gang, "c0", "cpu", infos[1:])
    assert nodes_of(gang, "a") == ["c1", "c1"]
    assert gangs.join(placement, "b") is gang
    assert nodes_of(gang, "b") == ["c0", "c0"]
    gangs.leave(gang, "a")
    gangs.leave(gang, "b")
    assert gangs.find(placement) is None


def test_ranks_do_not_move_onto_devices_that_are_planned_for_others_of_their_placement():
    infos = [cpu_node("c0", 2), cpu_node("c1", 2)]
    gangs, _, gang = joined(infos, [Request("a", 2), Request("b", 2)], ["a"])
    with pytest.raises(InfeasiblePlacement):
        gangs.move(gang, "c0", "cpu", infos[1:])
