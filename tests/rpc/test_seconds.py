"""Durations that are none are refused where they are given, before a timer is set with them."""

import math

import pytest
from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.lock import Lock
from miles_agents.rpc.seconds import NotADuration, checked_seconds
from miles_controller.lock_service import LockService

NO_DURATIONS = [math.nan, math.inf, -math.inf, "5", 10**400, [1]]


class Worker(Actor):
    @endpoint
    def work(self): ...


@pytest.mark.parametrize("value", NO_DURATIONS, ids=lambda value: f"{value!r:.6}")
def test_what_is_no_duration_is_refused_by_its_argument(value):
    with pytest.raises(NotADuration, match="hold_s is not a positive finite"):
        Lock("l", hold_s=value)
    with pytest.raises(NotADuration, match="timeout_s is not a finite"):
        Lock("l", timeout_s=value)


def test_a_lock_is_held_for_some_time_and_an_expired_deadline_is_one():
    for hold_s in (0, -1.0):
        with pytest.raises(NotADuration, match="positive"):
            Lock("l", hold_s=hold_s)
    assert checked_seconds("timeout_s", -1) == -1.0
    assert checked_seconds("timeout_s", None) is None


@virtual
async def test_options_with_no_duration_are_refused_and_other_calls_go_on():
    async with wired() as net:
        mesh = net.spawn(Worker)
        for value in NO_DURATIONS:
            with pytest.raises(NotADuration, match="timeout_s"):
                mesh.options(timeout_s=value)
        await mesh.options(timeout_s=1e300).work.call_one()


@virtual
async def test_a_lock_service_refuses_what_a_peer_did_not_check():
    locks = LockService()
    with pytest.raises(NotADuration, match="hold_s"):
        await locks.acquire("l", math.nan, 1)
    assert locks.snapshot() == {}
