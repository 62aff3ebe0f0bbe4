"""For rollout tests: scripted engines behind a scripted router over real HTTP, arguments, data files, a manager."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, web
from tokenizers import Tokenizer

from miles.backends.weight_update.messages import EngineTarget
from miles.flags.table import table
from miles.rollout.manager import RolloutManager
from miles.utils.arguments import namespace
from miles.utils.async_utils import LoopThread
from support.tiny_models import IM_END_ID, tiny_model

KEY = "secret"


@functools.cache
def tokenizer() -> Tokenizer:
    """One token per byte."""
    return Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))


def ids_of(text: str) -> list[int]:
    """Token ids of a text."""
    return tokenizer().encode(text, add_special_tokens=False).ids


def text_of(ids: Any, *, with_special: bool = False) -> str:
    """The text of token ids."""
    return tokenizer().decode([int(i) for i in ids], skip_special_tokens=not with_special)


@dataclass
class Answer:
    """What an engine says to a request; ``hangs_after`` so many tokens until it is aborted."""

    text: str = "\\boxed{4}"
    hangs_after: int | None = None
    ends: bool = True
    status: int = 200
    body: str = ""


Script = Callable[[dict[str, Any], str], Answer]
"""The request and its prompt as text (one byte is one token), to what is answered."""


@dataclass
class FakeEngine:
    """Says what its script says, a token at a time; knows ``/abort_request``, like the real one by exact id only."""

    script: Script
    version: str = "1"
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    down: bool = False
    deaf: bool = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort)
        app.router.add_get("/health", self.health)
        app.router.add_get("/model_info", self.health)
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "fake", "is_generation": True})

    async def abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.append(rid)
        if rid in self.running and not self.deaf:
            self.running[rid].set()
        return web.Response()

    async def generate(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        payload = await request.json()
        self.requests.append(payload)
        self.headers.append(dict(request.headers))
        if self.down:
            return web.Response(status=503)
        answer = self.script(payload, text_of(payload["input_ids"]))
        if answer.status != 200:
            return web.Response(status=answer.status, text=answer.body)
        stop = self.running.setdefault(payload["rid"], asyncio.Event())
        try:
            ids, reason = await self._make(answer, payload["sampling_params"]["max_new_tokens"], stop)
        finally:
            del self.running[payload["rid"]]
        return web.json_response(self._response(payload, ids, reason))

    async def _make(self, answer: Answer, limit: int, stop: asyncio.Event) -> tuple[list[int], str]:
        ids = [*ids_of(answer.text), *([IM_END_ID] if answer.ends else [])]
        made: list[int] = []
        for i in ids[:limit]:
            if len(made) == answer.hangs_after:
                await stop.wait()
                return made, "abort"
            made.append(i)
        return made, "length" if len(ids) > limit or not answer.ends else "stop"

    def _response(self, payload: dict[str, Any], ids: list[int], reason: str) -> dict[str, Any]:
        return {
            "text": text_of(ids, with_special=True),
            "output_ids": ids,
            "meta_info": {
                "id": payload["rid"],
                "finish_reason": {"type": reason},
                "prompt_tokens": len(payload["input_ids"]),
                "completion_tokens": len(ids),
                "cached_tokens": 0,
                "weight_version": self.version,
                "output_token_logprobs": [[-i / 1000, i, None] for i in ids],
            },
        }


class FakeRouter:
    """One engine after the other; like the real one it answers 503 where an engine is down, and passes no aborts on."""

    def __init__(self, engines: list[FakeEngine]) -> None:
        self.engines = engines
        self.turn = itertools.count()
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        return app

    async def generate(self, request: web.Request) -> web.Response:
        engine = self.engines[next(self.turn) % len(self.engines)]
        headers = {k: v for k, v in request.headers.items() if k in ("Authorization", "X-SMG-Routing-Key")}
        try:
            async with (
                ClientSession() as session,
                session.post(f"{engine.url}/generate", json=await request.json(), headers=headers) as response,
            ):
                return web.Response(
                    body=await response.read(), status=response.status, content_type=response.content_type
                )
        except ClientError as error:
            return web.Response(status=502, text=str(error))


@dataclass
class Servers:
    """A running set."""

    engines: list[FakeEngine]
    router: FakeRouter

    @property
    def targets(self) -> list[EngineTarget]:
        return [EngineTarget(f"engine-{i}", e.url, KEY, 1, 1 + i, False) for i, e in enumerate(self.engines)]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for engine in self.engines for request in engine.requests]


@contextmanager
def servers(script: Script | None = None, *, count: int = 1) -> Iterator[Servers]:
    """Engines behind a router, on a thread of their own."""
    thread = LoopThread("fake-engines")
    engines = [FakeEngine(script or (lambda payload, prompt: Answer())) for _ in range(count)]
    found = Servers(engines, FakeRouter(engines))
    runners = [thread.run(_serve(server)) for server in (*engines, found.router)]
    try:
        yield found
    finally:
        for runner in runners:
            thread.run(runner.cleanup())
        thread.stop()


async def _serve(server: FakeEngine | FakeRouter) -> web.AppRunner:
    runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    return runner


def make_args(**values: Any) -> Any:
    """Arguments with the flags' defaults and small sizes."""
    return namespace(make_config(**values))


def make_config(**values: Any) -> dict[str, Any]:
    """The same as a config."""
    config = dict(table().defaults())
    config |= {
        "hf_checkpoint": str(tiny_model()),
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "global_batch_size": 8,
        "rollout_max_response_len": 32,
        "rollout_num_gpus": 1,
        "rollout_num_engines": 1,
        "dp_size": 1,
        "world_size": 1,
        "rm_type": "math",
    }
    return config | values


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """A data file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(path: Path, count: int = 8) -> str:
    """A data file of ``i+1=`` and its answer."""
    return write_jsonl(path, [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(count)])


def adds(payload: dict[str, Any], prompt: str) -> Answer:
    """A script that adds correctly."""
    left, _, right = prompt.partition("=")[0].partition("+")
    return Answer(f"\\boxed{{{int(left) + int(right)}}}")


class LocalManager(RolloutManager):
    """Outside a worker: what goes to the store is kept here."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.shipped: dict[int, Any] = {}

    async def _put(self, parts: list[dict[str, Any]]) -> list[Any]:
        refs = list(range(len(self.shipped), len(self.shipped) + len(parts)))
        self.shipped.update(zip(refs, parts, strict=True))
        return refs

    async def _remove(self, ref: Any) -> None:
        del self.shipped[ref]

    async def _remove_left(self, kept: list[Any]) -> None:
        assert set(kept) <= set(self.shipped)


@contextmanager
def manager(config: dict[str, Any]) -> Iterator[LocalManager]:
    """A manager in this process, closed at the end."""
    made = LocalManager(config)
    try:
        yield made
    finally:
        made.close()
