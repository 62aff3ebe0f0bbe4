"""``remote_rm``: what a real server is sent, which of its answers are rewards, and what it may cost."""

import asyncio
import time
from argparse import Namespace
from itertools import pairwise

import pytest
from aiohttp import web
from support.http_server import server
from support.rollout_cases import make_args

from miles.rollout.rm_hub import async_rm, remote_rm
from miles.rollout.rm_hub.remote import Budget, NoRemoteReward, ask, budget_of
from miles.utils.http_utils import RequestRefused, close_http_client
from miles.utils.types import Sample

QUICK = Budget(retries=3, total_s=5.0, attempt_s=1.0, first_wait_s=0.001, most_wait_s=0.002)


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()


def answers(*replies):
    """Each reply is a status, or a body, or both; the last one is repeated. ``None`` hangs up, ``...`` hangs."""

    async def handler(request, number):
        reply = replies[min(number, len(replies)) - 1]
        if reply is None:
            request.transport.close()
            return web.Response()
        if reply is ...:
            await asyncio.Event().wait()
        status, body = reply if isinstance(reply, tuple) else (reply, "") if isinstance(reply, int) else (200, reply)
        return web.Response(status=status, body=body)

    return handler


NO = NoRemoteReward
CASES = [
    # replies, reward or error, requests that were made
    (["1"], 1, 1),
    (["0"], 0, 1),
    (["0.5"], 0.5, 1),
    (["-1.5e-3"], -0.0015, 1),
    (["true"], True, 1),
    (["null"], None, 1),
    (['{"score": 0.5}'], {"score": 0.5}, 1),
    (['{"score": 1, "acc": true, "pred": "x"}'], {"score": 1, "acc": True, "pred": "x"}, 1),
    (["[1, 2]"], [1, 2], 1),
    (["{}"], {}, 1),
    (['"0.5"'], "0.5", 1),  # text that is a number
    ([" 1\n"], 1, 1),
    (['{"a": "日本"}'.encode()], {"a": "日本"}, 1),
    (["good"], "not JSON", 1),
    (['"good"'], "not JSON", 1),
    ([""], "not JSON", 1),
    (["<html>502</html>"], "<html>502</html>", 1),
    (["{broken"], "{broken", 1),
    ([b"\xff\xfe"], "not JSON", 1),
    (["x" * 100_000], "not JSON", 1),
    ([500, "1"], 1, 2),
    ([500, 502, 503, "1"], 1, 4),
    ([429, "1"], 1, 2),
    ([408, "1"], 1, 2),
    ([504, "1"], 1, 2),
    ([None, "1"], 1, 2),  # the connection ends without an answer
    ([None, 500, "0.5"], 0.5, 3),
    ([(500, "busy")], "the last: HTTP 500: busy", 4),
    ([500, None, (503, "no judge")], "no judge", 4),
    ([None], "4 attempts", 4),
    ([400], RequestRefused, 1),
    ([(401, "who are you")], RequestRefused, 1),
    ([403], RequestRefused, 1),
    ([404], RequestRefused, 1),
    ([422], RequestRefused, 1),
    ([501], RequestRefused, 1),
    ([500, 404], RequestRefused, 2),
    ([500, "bad"], "not JSON", 2),
]


@pytest.mark.parametrize(("replies", "reward", "requests"), CASES, ids=range(len(CASES)))
async def test_answers(replies, reward, requests):
    made = 0

    async def counted(request, number):
        nonlocal made
        made = number
        return await answers(*replies)(request, number)

    with server(counted) as url:
        if reward is RequestRefused:
            with pytest.raises(RequestRefused, match=url):
                await ask(url, Sample(), "", QUICK)
        elif isinstance(reward, str) and reward != "0.5":
            with pytest.raises(NO) as caught:
                await ask(url, Sample(), "", QUICK)
            assert url in caught.value.what
            assert reward in f"{caught.value.what} {caught.value.evidence}"
        else:
            found = await ask(url, Sample(), "", QUICK)
            assert (found, type(found)) == (reward, type(reward))
    assert made == requests


async def test_what_is_sent():
    asked = []

    async def handler(request, number):
        asked.append(await request.json())
        return web.json_response(1)

    prompt = [{"role": "user", "content": "日本?"}]
    with server(handler) as url:
        args = make_args(rm_type="remote_rm", rm_url=url)
        assert await remote_rm(args, Sample(prompt="p", response="r", label="l")) == 1
        assert await async_rm(args, Sample(prompt=prompt, response="so \\boxed{4}", label=None)) == 1
        args.rm_type = "boxed_remote_rm"
        assert await async_rm(args, Sample(prompt="p", response="so \\boxed{4}", label="4")) == 1
    assert asked == [
        {"prompt": "p", "response": "r", "label": "l"},
        {"prompt": prompt, "response": "so \\boxed{4}", "label": None},
        {"prompt": "p", "response": "4", "label": "4"},
    ]


async def test_a_server_that_hangs_is_asked_again_within_the_time():
    with server(answers(..., ..., "1")) as url:
        budget = Budget(retries=3, total_s=5.0, attempt_s=0.1, first_wait_s=0.001)
        assert await ask(url, Sample(), "", budget) == 1
    with server(answers(...)) as url:
        began = time.monotonic()
        with pytest.raises(NO, match="gives no reward") as caught:
            await ask(url, Sample(), "", Budget(retries=100, total_s=0.4, attempt_s=0.15, first_wait_s=0.001))
        assert time.monotonic() - began < 2.0
        assert "at most 101, and 0 s" in caught.value.evidence
    assert caught.value.fields["url"] == url


async def test_nobody_at_that_address():
    with server(answers("1")) as url:
        pass
    with pytest.raises(NO, match=url) as caught:
        await ask(url, Sample(), "", QUICK)
    assert "4 attempts" in caught.value.evidence
    assert "cannot connect" in caught.value.evidence
    assert "--rm-max-retries" in caught.value.advice


async def test_waits_grow_and_are_bounded():
    times = []

    async def handler(request, number):
        times.append(time.monotonic())
        return web.Response(status=500)

    budget = Budget(retries=5, total_s=9.0, attempt_s=1.0, first_wait_s=0.02, most_wait_s=0.08)
    with server(handler) as url, pytest.raises(NO):
        await ask(url, Sample(), "", budget)
    waits = [after - before for before, after in pairwise(times)]
    assert len(waits) == 5
    for wait, least in zip(waits, (0.015, 0.03, 0.06, 0.06, 0.06), strict=True):
        assert wait >= least


def test_the_flags_give_the_budget():
    assert budget_of(make_args()) == Budget() == budget_of(Namespace())
    found = budget_of(make_args(rm_max_retries=0, rm_timeout=60.0))
    assert (found.retries, found.total_s, found.attempt_s) == (0, 60.0, 20.0)
