"""An OpenAI-compatible address for agents, which keeps what they ask and get as samples: token in, token out.

One server per process, on 127.0.0.1 and a loop thread of its own, so that an agent that blocks its loop does not block
it. Each session has a path that cannot be guessed. A request whose messages go on from an earlier answer of the session
is answered from that answer's tokens, with what is new appended; any other begins a sequence of its own.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from miles.rollout.generate_utils.chat_requests import Refused, checked_body, limit_of, message_key
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_request_payload,
    generate_url,
    update_sample_from_response,
)
from miles.rollout.generate_utils.tool_call_utils import (
    BadTools,
    ToolCallParser,
    checked_tools,
    stop_text,
    update_sample_with_tool_responses,
)
from miles.utils.async_utils import LoopThread
from miles.utils.http_utils import RequestFailed, RequestRefused, post, request_scope
from miles.utils.processing_utils import NoChatTemplate, apply_chat_template, shared_tokenizer
from miles.utils.types import BadSample, Sample, SampleStatus

_PARAMETERS = ("temperature", "top_p", "top_k", "stop", "seed", "presence_penalty", "frequency_penalty")
_RENAMED = {"seed": "sampling_seed"}
_END = {SampleStatus.TRUNCATED: "length", SampleStatus.COMPLETED: "stop"}
_MAX_BODY = 256 << 20
UNASKED_ABORTS = 3
"""How often an answer that an engine aborted by itself is gone on with."""


@dataclass(frozen=True)
class Asked:
    """What the one who opens a session wants.

    Attributes:
        sampling_params: Of requests that do not say otherwise.
        routing_key: Keeps the session with an engine.
        scope: Of its requests to engines: who aborts selects by it.
        stops: Whether samples shall stop.
    """

    sampling_params: Mapping[str, Any]
    routing_key: str
    scope: str
    stops: Callable[[], bool]


@dataclass
class _Sequence:
    """Tokens of one run of messages, each answer in it included."""

    sample: Sample
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class Session:
    """What one agent asks. Lives on the server's loop."""

    def __init__(self, args: Any, asked: Asked) -> None:
        self.args = args
        self.sequences: list[_Sequence] = []
        self._asked = asked
        self._tokenizer = shared_tokenizer(args.hf_checkpoint, args.chat_template_path)
        self._one_at_a_time = asyncio.Lock()

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer ``/v1/chat/completions``, whose body is checked. Raises Refused. What fails leaves no trace: it may be
        asked again."""
        messages, tools = body["messages"], body.get("tools") or None
        if tools is not None:
            tools = checked_tools(tools, "tools")
        request_scope.set(self._asked.scope)  # so that aborts find what this asks of engines
        async with self._one_at_a_time:
            kept = [(sequence, copy.deepcopy(sequence.sample)) for sequence in self.sequences]
            try:
                sequence = self._sequence_for(messages, tools)
                start = len(sequence.sample.tokens)
                await self._generate(sequence.sample, self._params_of(body))
                answer = await self._answer(sequence, start)
            except BaseException:
                for known, sample in kept:
                    known.sample = sample
                self.sequences = [known for known, _ in kept]
                raise
            sequence.messages = [*messages, answer]
        return _completion(body, sequence.sample, answer, start)

    def _sequence_for(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> _Sequence:
        kwargs = self.args.apply_chat_template_kwargs or {}
        keys = [message_key(message) for message in messages]
        for sequence in reversed(self.sequences):
            known = [message_key(message) for message in sequence.messages]
            if sequence.tools == tools and len(keys) > len(known) and keys[: len(known)] == known:
                update_sample_with_tool_responses(
                    sequence.sample, messages[len(known) :], self._tokenizer, tools=tools, template_kwargs=kwargs
                )
                return sequence
        text = apply_chat_template(self._tokenizer, messages, tools=tools, **kwargs)
        tokens = [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]
        sample = Sample(prompt=list(messages), tokens=tokens, loss_mask=[], rollout_log_probs=[])
        sequence = _Sequence(sample, [], tools)
        self.sequences.append(sequence)
        return sequence

    def _params_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        asked = {_RENAMED.get(name, name): body[name] for name in _PARAMETERS if body.get(name) is not None}
        limit = limit_of(body)
        own = self._asked.sampling_params.get("max_new_tokens")
        if limit is not None:
            asked["max_new_tokens"] = min(limit, own) if own is not None else limit
        return {**self._asked.sampling_params, **asked}

    async def _generate(self, sample: Sample, params: dict[str, Any]) -> None:
        start = len(sample.tokens)
        most = getattr(self.args, "max_seq_len", None)
        if most is not None:
            params["max_new_tokens"] = min(most - start, params.get("max_new_tokens") or most)
        for _ in range(UNASKED_ABORTS):
            payload, status = compute_request_payload(
                self.args, list(sample.tokens), params, generated=len(sample.tokens) - start
            )
            if payload is None:
                sample.status = status or SampleStatus.TRUNCATED
                return
            headers = {"X-SMG-Routing-Key": self._asked.routing_key}
            output = await post(generate_url(self.args), payload, headers=headers)
            update_sample_from_response(
                self.args, sample, payload, output, tokenizer=self._tokenizer, update_loss_mask=True
            )
            if sample.status is not SampleStatus.ABORTED:
                return
            if self._asked.stops():
                break
        raise Refused(503, "aborted: samples shall stop")

    async def _answer(self, sequence: _Sequence, start: int) -> dict[str, Any]:
        """The assistant's message: the tokens from ``start`` on."""
        sample = sequence.sample
        ids = sample.tokens[start:]
        if ids and stop_text(sample, self._tokenizer) is not None:
            ids = ids[:-1]
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False))
        name = getattr(self.args, "generate_tool_call_parser", None) or getattr(
            self.args, "sglang_tool_call_parser", None
        )
        if not sequence.tools or not name or sample.status is not SampleStatus.COMPLETED:
            return {"role": "assistant", "content": text}
        parsed = await ToolCallParser(sequence.tools, name).parse(text)
        if not parsed.calls:
            return {"role": "assistant", "content": text}
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parsed.calls
        ]
        return {"role": "assistant", "content": parsed.text or None, "tool_calls": calls}


def _completion(body: Mapping[str, Any], sample: Sample, answer: dict[str, Any], start: int) -> dict[str, Any]:
    reason = "tool_calls" if answer.get("tool_calls") else _END.get(sample.status, "stop")
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model") or "default",
        "choices": [{"index": 0, "message": answer, "finish_reason": reason, "logprobs": None}],
        "usage": {
            "prompt_tokens": start,
            "completion_tokens": len(sample.tokens) - start,
            "total_tokens": len(sample.tokens),
        },
    }


class _Server:
    """The sessions of this process."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.thread = LoopThread("agent-endpoint")
        self._runner, self.url = self.thread.run(self._start())

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application(client_max_size=_MAX_BODY)
        for path in ("/sessions/{session}/v1/chat/completions", "/sessions/{session}/chat/completions"):
            app.router.add_post(path, self._chat)
        runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _chat(self, request: web.Request) -> web.Response:
        session = self.sessions.get(request.match_info["session"])
        if session is None:
            return _error(404, "there is no such session")
        try:
            return web.json_response(await session.chat(checked_body(await _json_of(request))))
        except Refused as error:
            return _error(error.status, str(error))
        except (RequestRefused, NoChatTemplate, BadTools, BadSample) as error:
            return _error(400, f"{error.what}: {error.evidence}")
        except RequestFailed as error:
            return _error(503, f"{error.what}: {error.evidence}")

    def close(self) -> None:
        self.thread.run(self._runner.cleanup(), timeout_s=5.0)
        self.thread.stop()


async def _json_of(request: web.Request) -> Any:
    try:
        return await request.json()
    except (ValueError, LookupError, RecursionError) as error:  # also bytes that are no text, and unknown encodings
        raise Refused(400, f"not JSON: {error}") from error


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


_server: _Server | None = None
_lock = threading.Lock()


def _get_server() -> _Server:
    global _server
    with _lock:
        if _server is None:
            _server = _Server()
        return _server


def close_agent_server() -> None:
    """End the server of this process, if there is one."""
    global _server
    with _lock:
        server, _server = _server, None
    if server is not None:
        server.close()


class OpenAIEndpointTracer:
    """One session.

    Attributes:
        base_url: For the agent: ``AsyncOpenAI(base_url=f"{base_url}/v1", api_key="-")``.
    """

    def __init__(self, server: _Server, name: str) -> None:
        self._server, self._name = server, name
        self.base_url = f"{server.url}/sessions/{name}"

    @classmethod
    async def create(
        cls,
        args: Any,
        sampling_params: Mapping[str, Any] | None = None,
        *,
        routing_key: str | None = None,
        stops: Callable[[], bool] = lambda: False,
    ) -> OpenAIEndpointTracer:
        """Open one. See ``Asked``."""
        server, name = await asyncio.to_thread(_get_server), secrets.token_urlsafe(32)
        asked = Asked(sampling_params or {}, routing_key or uuid.uuid4().hex, request_scope.get(), stops)

        async def session() -> Session:
            return Session(args, asked)

        server.sessions[name] = await server.thread.submit(session())
        return cls(server, name)

    async def collect_samples(self) -> list[Sample]:
        """Close it. Returns a sample for each sequence of messages, in the order in which they were begun."""
        session = self._server.sessions.pop(self._name, None)
        sequences = session.sequences if session is not None else []
        return [sequence.sample for sequence in sequences if sequence.sample.response_length]
