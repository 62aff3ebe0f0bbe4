"""For tests of tools: engines that also read tool calls, as SGLang's ``qwen25`` parser does, and a state to generate
with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from miles.rollout.engines import engines
from miles.rollout.hooks import close_hook_pool
from miles.rollout.inference_rollout.inference_rollout_common import GenerateState
from miles.utils.async_utils import LoopThread
from miles.utils.http_utils import close_http_client
from support.rollout_cases import KEY, FakeEngine, FakeRouter, Script, Servers, _serve, make_args

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "the sum of two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [CALCULATOR, SEARCH]
CALLS: list[str] = []


def call(name: str, **arguments: Any) -> str:
    """How a model of the Qwen family writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


PARSED = [
    ("no call", "no call", []),
    ("", "", []),
    (call("add", a=1, b=2), "", [("add", {"a": 1, "b": 2})]),
    ("I add.\n" + call("add", a=1), "I add.", [("add", {"a": 1})]),
    (call("add", a=1) + "\n" + call("search"), "", [("add", {"a": 1}), ("search", {})]),
    (call("add", a=1) + " and so on", "", [("add", {"a": 1})]),
    ("<tool_call>\n{broken\n</tool_call>", "", []),
    ("so:\n<tool_call>\n{}\n</tool_call>", "so:", []),
    (call("delete", path="/"), "", []),
    (call("add", a=1)[:-5], "", []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("<tool_call>\n[1]\n</tool_call>", None, []),
    (call("add", a="é <|im_end|>"), "", [("add", {"a": "é <|im_end|>"})]),
]
"""An answer; what is left of it (None: the parser raises, which is status 500); the calls."""


def parse_qwen(text: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """As the real one: blocks that are no JSON, and names that there are not, are left out."""
    names = [tool["function"]["name"] for tool in tools]
    if "<tool_call>\n" not in text:
        return {"normal_text": text, "calls": []}
    calls = []
    for block in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL):
        try:
            said = json.loads(block.strip())
        except ValueError:
            continue
        for one in said if isinstance(said, list) else [said]:
            if one.get("name") in names:
                parameters = json.dumps(one.get("arguments", {}), ensure_ascii=False)
                calls.append({"tool_index": names.index(one["name"]), "name": one["name"], "parameters": parameters})
    return {"normal_text": text[: text.index("<tool_call>\n")].strip(), "calls": calls}


class ToolEngine(FakeEngine):
    """Also knows ``/parse_function_call``."""

    parses = 0
    parse_status = 200

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/parse_function_call", self.parse)
        return app

    async def parse(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        if self.parse_status != 200:
            return web.Response(status=self.parse_status, text="no such parser")
        body = await request.json()
        self.parses += bool(body["text"])
        try:
            if body["tool_call_parser"] != "qwen25":
                raise AttributeError("no such parser")
            return web.json_response(parse_qwen(body["text"], body["tools"]))
        except AttributeError as error:
            return web.Response(status=500, text=str(error))


@contextmanager
def tool_servers(script: Script, *, count: int = 1) -> Iterator[Servers]:
    """Such engines behind a router, which the rollout of this process uses."""
    thread = LoopThread("fake-engines")
    fakes: list[Any] = [ToolEngine(script) for _ in range(count)]
    found = Servers(fakes, FakeRouter(fakes))
    runners = [thread.run(_serve(server)) for server in (*fakes, found.router)]
    engines.set(found.targets, found.router.url, KEY)
    try:
        yield found
    finally:
        close_http_client()
        close_hook_pool()
        for runner in runners:
            thread.run(runner.cleanup())
        thread.stop()


def tool_state(servers: Servers, **flags: Any) -> GenerateState:
    """With the flags of the multi-turn function."""
    host, _, port = servers.router.url.removeprefix("http://").rpartition(":")
    own: dict[str, Any] = {
        "generate_max_turns": 4,
        "generate_tool_specs_path": "support.tool_cases.TOOLS",
        "generate_tool_call_parser": "qwen25",
        "generate_execute_tool_function_path": "support.tool_cases.execute",
        "generate_tool_timeout": 5.0,
        "rollout_max_response_len": 256,
    }
    args = make_args(**own | flags)
    args.sglang_router_ip, args.sglang_router_port = host, int(port)
    return GenerateState(args)


async def execute(name: str, arguments: dict[str, Any]) -> str:
    """The tools."""
    if name == "search":
        raise LookupError("nothing found")
    return str(arguments["a"] + arguments["b"])
