"""What the loop does about engines that come back, while it waits for generation; and what the page says of it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from miles.backends.sglang_utils.engine_lives import BUDGET
from miles.backends.sglang_utils.fleet_parts import AGAIN_S, HEARTBEATS
from miles.flags.table import table
from miles.training.engine_recovery import EngineRecovery
from miles_agents.errors import PeerFault


class Fleet:
    """Engines as numbers: so many serve, so many wait for weights."""

    def __init__(self, serving, waiting):
        self.recovery, self.targets, self.router_url, self.api_key = self, [], "http://a", "key"
        self.num_serving, self.num_waiting = serving, waiting
        self.changed = asyncio.Event()

    async def next_change(self):
        await self.changed.wait()

    def become(self, serving, waiting):
        self.num_serving, self.num_waiting = serving, waiting
        self.changed.set()
        self.changed = asyncio.Event()


class Loop:
    """Counts what is asked of it. ``generated`` is what it waits for."""

    def __init__(self, serving, waiting, *, can_catch_up, trainer="there"):
        self.fleet, self.done, self.told = Fleet(serving, waiting), [], []
        self.generated = asyncio.get_running_loop().create_future()
        self.fails = 0
        self.may_update = True
        self.may_end = asyncio.Event()
        self.may_end.set()
        rollout = SimpleNamespace(set_engines=SimpleNamespace(call_one=self.tell))
        parts = SimpleNamespace(fleet=self.fleet, trainer=trainer, rollout=rollout, calls=lambda mesh, _: mesh)
        self.recovery = EngineRecovery(
            parts,
            catch_up=lambda: self.give("catch up"),
            update=lambda: self.give("update"),
            can_catch_up=lambda: can_catch_up,
            ask_again_s=0.0,
        )
        self.task = asyncio.ensure_future(self.wait())

    async def wait(self):
        return await self.generated

    async def give(self, what):
        if not self.may_update:
            return False
        self.done.append(what)
        await self.may_end.wait()
        self.fleet.become(self.fleet.num_serving + self.fleet.num_waiting, 0)
        return True

    async def tell(self, targets, url, key):
        if self.fails:
            self.fails -= 1
            raise PeerFault("the rollout manager is not there")
        self.told.append((list(targets), url))


async def turns(count=20):
    """Everything that can go on does."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("serving", "can_catch_up", "expected"),
    [(1, True, ["catch up"]), (0, True, ["catch up"]), (1, False, []), (0, False, ["update"])],
)
async def test_an_engine_that_comes_back_gets_weights_if_that_can_be(serving, can_catch_up, expected):
    loop = Loop(serving, 0, can_catch_up=can_catch_up)
    result = asyncio.ensure_future(loop.recovery.result_of(loop.task))
    await turns()
    assert loop.done == []
    loop.fleet.become(serving, 1)
    await turns()
    assert loop.done == expected and not result.done()
    loop.generated.set_result("groups")
    assert await result == "groups"


async def test_the_last_that_serves_dies_while_another_waits_for_the_next_update():
    loop = Loop(1, 1, can_catch_up=False)
    result = asyncio.ensure_future(loop.recovery.result_of(loop.task))
    await turns()
    assert loop.done == []
    loop.fleet.become(0, 1)
    await turns()
    assert loop.done == ["update"]
    loop.generated.set_result(1)
    assert await result == 1


async def test_an_update_that_must_not_be_yet_is_asked_for_again():
    loop = Loop(0, 1, can_catch_up=False)
    loop.may_update = False
    result = asyncio.ensure_future(loop.recovery.result_of(loop.task))
    await turns()
    assert loop.done == []
    loop.may_update = True
    await turns()
    assert loop.done == ["update"]
    loop.generated.set_result("groups")
    assert await result == "groups"


async def test_a_catch_up_under_way_is_finished_before_training_begins():
    loop = Loop(1, 0, can_catch_up=True)
    result = asyncio.ensure_future(loop.recovery.result_of(loop.task))
    await turns()
    loop.may_end.clear()
    loop.fleet.become(1, 1)
    await turns()
    loop.generated.set_result(1)
    await turns()
    assert loop.done == ["catch up"] and not result.done()
    loop.may_end.set()
    assert await result == 1


@pytest.mark.parametrize(("serving", "ends"), [(1, False), (0, True)])
async def test_an_update_that_waits_for_a_rollout_comes_at_once_if_nobody_generates_it(serving, ends):
    loop = Loop(serving, 0, can_catch_up=False)
    waiting = asyncio.ensure_future(loop.recovery.until_update(loop.task))
    await turns()
    loop.fleet.become(serving, 1)
    await turns()
    assert waiting.done() == ends and loop.done == [] and not loop.task.done()
    loop.generated.set_result(1)
    await waiting


async def test_a_rollout_that_fails_tells_so():
    loop = Loop(1, 0, can_catch_up=True)
    loop.generated.set_exception(PeerFault("no more"))
    with pytest.raises(PeerFault, match="no more"):
        await loop.recovery.result_of(loop.task)


async def test_without_a_trainer_or_recovery_it_only_waits():
    for change in ({"trainer": None}, {}):
        loop = Loop(0, 1, can_catch_up=False, **change)
        if not change:
            loop.fleet.recovery = None
        result = asyncio.ensure_future(loop.recovery.result_of(loop.task))
        await turns()
        loop.generated.set_result(1)
        assert await result == 1 and loop.done == []


async def test_the_rollout_manager_is_told_of_every_change_also_if_it_was_away():
    loop = Loop(1, 0, can_catch_up=True)
    loop.fails = 1
    async with loop.recovery.telling():
        while not loop.told:  # after a moment, again
            await asyncio.wait({asyncio.ensure_future(turns())})
        loop.fleet.targets, loop.fleet.router_url = ["engine-0"], "http://b"
        loop.fleet.become(1, 0)
        await turns()
        loop.fleet.become(1, 0)
        await turns()
    assert loop.told == [([], "http://a"), (["engine-0"], "http://b")]
    loop.generated.set_result(None)


def test_the_page_has_the_numbers_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()
    flags = table().by_name
    for name in ("interval", "timeout", "first-wait"):
        flag = flags[f"--rollout-health-check-{name}"]
        assert f"| `{flag.name}` | {flag.default} |" in page
    assert f"repeated after {AGAIN_S:g} second; with the {HEARTBEATS}nd that fails" in page
    assert f"a backoff of {BUDGET.backoff_s:g} second" in page and f"up to {BUDGET.backoff_cap_s:g} seconds" in page
    assert f"restarted {BUDGET.max_restarts} times within {BUDGET.window_s:g} seconds" in page
