"""HTTP of rollouts: retries, keys, ids, aborts."""

import asyncio
import socket
import threading

import pytest
from aiohttp import web
from support.http_server import server
from support.procs import eventually
from support.rollout_cases import Answer, servers

from miles.backends.weight_update.messages import EngineTarget
from miles.rollout.engines import Engines
from miles.utils.async_utils import WouldBlockLoop, run, stop_loop_thread
from miles.utils.http_utils import (
    DEFAULT_RETRIES,
    RequestFailed,
    RequestRefused,
    _Call,
    _Passing,
    backoff_s,
    close_http_client,
    find_available_port,
    get,
    http_client,
    post,
    request_scope,
)
from miles.utils.misc import SingletonMeta, get_free_port, should_run_periodic_action


@pytest.fixture(autouse=True)
def clean():
    yield
    close_http_client()
    stop_loop_thread()


async def test_passing_troubles_are_retried_and_answers_parsed():
    async def handler(request, number):
        return web.Response(status=503) if number < 3 else web.json_response({"n": number})

    with server(handler) as url:
        assert await post(url + "/x", {"a": 1}) == {"n": 3}

    async def text(request, number):
        return web.Response(text="plain")

    with server(text) as url:
        assert await get(url) == "plain"


async def test_what_is_wrong_is_not_retried():
    seen = []

    async def handler(request, number):
        seen.append(number)
        return web.Response(status=422, text="no such field")

    with server(handler) as url, pytest.raises(RequestRefused, match="no such field") as caught:
        await post(url, {})
    assert seen == [1]
    assert caught.value.fields["status"] == 422


async def test_nobody_there_is_told_after_the_tries():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/generate"
        with pytest.raises(RequestFailed, match="3 attempts; the last: cannot connect"):
            await post(url, {}, max_retries=2)


async def test_a_deadline_bounds_all_tries():
    async def handler(request, number):
        await asyncio.Event().wait()

    with server(handler) as url, pytest.raises(RequestFailed):
        await http_client().request("GET", url, deadline_s=0.3)


async def test_only_addresses_of_the_run_get_its_key_and_an_id():
    with servers() as fake:
        Engines().set(fake.targets, fake.router.url, "secret")
        payload = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}
        request_scope.set("train-0")
        assert (await post(f"{fake.router.url}/generate", payload))["meta_info"]["completion_tokens"] == 2
        assert len(fake.requests[0]["rid"]) == 32
        assert "rid" not in payload
        assert http_client().in_flight("train-0") == []
    seen = {}

    async def handler(request, number):
        seen.update(request.headers)
        return web.json_response(await request.json())

    with server(handler) as url:
        assert await post(f"{url}/generate", {"x": 1}) == {"x": 1}
    assert "Authorization" not in seen


@pytest.mark.parametrize("way", ["by the router", "straight to the engine"])
async def test_a_request_is_aborted_by_its_id_also_if_its_caller_has_gone(way):
    with servers(lambda p, t: Answer(hangs_after=0)) as fake:
        engines = Engines()
        engines.set(fake.targets, fake.router.url, "secret")
        request_scope.set("train-1")
        url = fake.router.url if way == "by the router" else engines.next_engine_url()
        payload = {"input_ids": [1], "rid": "mine", "sampling_params": {"max_new_tokens": 2}}
        task = asyncio.ensure_future(post(f"{url}/generate", payload))
        await eventually(lambda: fake.engines[0].running)
        assert http_client().in_flight("train-1") == ["mine"]
        assert http_client().in_flight("eval-1") == []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert http_client().in_flight("train-1") == ["mine"]  # the engine goes on without a caller
        await engines.abort(["mine"])
        await eventually(lambda: not fake.engines[0].running)
        http_client().forget("train-1")
        await engines.abort_all("train-1")


async def test_a_request_to_an_address_that_has_moved_is_made_again_at_its_successor():
    """Of the router, and of engines; also one that is being repeated while they move."""
    tries = []

    async def failing(request, number):
        tries.append(number)
        return web.Response(status=503)

    async def well(request, number):
        return web.json_response({"path": request.path, "key": request.headers.get("Authorization")})

    engines = Engines()
    with server(failing) as old, server(failing) as engine, server(well) as new, server(well) as other:
        engines.set([target("engine-0", engine)], old, "first")
        repeated = [asyncio.ensure_future(post(url + "/x", {})) for url in (old, engine)]
        await eventually(lambda: len(tries) >= 4)
        engines.set([], old, "first")
        assert engines.owns(engine), "what fails there is no user's fault"
        engines.set([target("engine-0", other)], new, "second")
        assert await repeated[0] == {"path": "/x", "key": "Bearer second"}
        assert (await repeated[1])["key"] == "Bearer key-of-engine-0"
        assert await post(old + "/y", {}) == {"path": "/y", "key": "Bearer second"}
        assert engines.owns(old) and engines.owns(new) and not engines.owns("http://elsewhere:1")


async def test_requests_to_those_that_are_restarted_wait_for_them():
    """As long as their deadline, unless fewer tries are asked for."""

    async def late(request, number):
        return web.Response(status=503) if number <= 4 else web.json_response({"n": number})

    engines, retries = Engines(), http_client().retries
    with server(late) as url:
        engines.set([], url, "", are_restarted=True)
        with pytest.raises(RequestFailed):
            await post(url + "/x", {}, max_retries=1)
        assert http_client().retries == retries + 2
        waits = http_client()._waits_for_restart
        nobody, unwell = _Passing("cannot connect", may_run=False), _Passing("HTTP 500", may_run=False, status=500)
        assert waits(call_to(url, DEFAULT_RETRIES), nobody)
        assert not waits(call_to(url, 1), nobody)
        assert not waits(call_to("http://elsewhere:1", DEFAULT_RETRIES), nobody)
        assert not waits(call_to(url, DEFAULT_RETRIES), unwell)  # somebody is there, and will say so again
        assert await post(url + "/x", {}) == {"n": 5}


def test_however_long_it_waits_it_can_count():
    assert [backoff_s(attempt) for attempt in (1, 2, 10, 2000)] == [0.1, 0.2, 1.0, 1.0]


def target(name, url):
    return EngineTarget(name, url, f"key-of-{name}", 1, 1, True)


def call_to(url, max_retries):
    return _Call("POST", url + "/x", {}, {}, max_retries, 0.0, "", False)


def test_a_coroutine_can_be_run_from_ordinary_code():
    async def where():
        return threading.current_thread().name

    assert run(where()) == "miles-async"
    assert run(where()) == "miles-async"

    async def waits_for_itself():
        return run(where())

    with pytest.raises(WouldBlockLoop):
        run(waits_for_itself())


def test_ports_singletons_and_periods():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert get_free_port(port) > port and find_available_port(port) > port
        assert get_free_port(port - 1, consecutive=2) > port

    class One(metaclass=SingletonMeta):
        def __init__(self, value):
            self.value = value

    assert One(1) is One(2)
    assert One(3).value == 1
    SingletonMeta.clear_instances(One)
    assert One(4).value == 4
    SingletonMeta.clear_instances(One)
    due = [i for i in range(10) if should_run_periodic_action(i, 4, num_rollout_per_epoch=5, num_rollout=10)]
    assert due == [3, 4, 7, 9]
    assert not should_run_periodic_action(3, None)
