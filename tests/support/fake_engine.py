"""A scripted engine: SGLang's HTTP protocol with weights that are only bytes, answers that are only hashes, and faults.

It passes the same contract tests as the real one (``tests/engines/test_contract.py``). Runs in the test's event loop;
weights arrive through shared memory and broadcast as they do there.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import math
import threading
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file

from miles.backends.sglang_utils import receive_weights
from miles.backends.sglang_utils.server_arguments import RECEIVE_WEIGHTS
from support.procs import eventually

SAMPLING_PARAMETERS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
} | {
    "skip_special_tokens",
    "no_stop_trim",
    "spaces_between_special_tokens",
    "sampling_seed",
    "min_new_tokens",
}


class Refused(Exception):
    """Becomes an error answer."""

    def __init__(self, message, status=400):
        super().__init__(message)
        self.status = status


@dataclass
class Request:
    rid: str
    input_ids: list[int]
    max_new_tokens: int
    stops: set[int]
    cached: int
    tokens: list[int] = field(default_factory=list)
    versions: list[dict] = field(default_factory=list)
    finish: dict | None = None


class Gone(BaseException):
    """Ends whatever takes weights without a word, as the end of a process does."""


class FakeModel:
    """What our weight loader is given, in one rank of an engine."""

    def __init__(self, load_weights):
        self.load_weights = load_weights


def loads_into(held):
    """A ``load_weights`` that keeps copies in this dict."""
    return lambda named: held.update({name: tensor.clone() for name, tensor in named})


class FakeEngine:
    """One engine. ``faults[path]`` are taken one by one, each by one request: a status, "reset", "hang", "die", or
    "freeze": from then on it takes connections and says nothing, as a stopped process does. ``faults["bucket"]`` are
    taken by one bucket of a stream each: "raise", "close" (the line, without a word), "hang", "freeze", "die".
    """

    def __init__(self, *, model=None, api_key="", vocab_size=320, context=512, token_s=0.002, bracket=True, tp_size=1):
        self.api_key, self.vocab_size, self.context, self.token_s = api_key, vocab_size, context, token_s
        self.bracket = bracket
        self.told, self.frozen = {}, False
        self.slow_s = 0.0  # what each bucket takes
        self.answers = asyncio.Event()  # not set: updates are loaded and not answered
        self.faults = defaultdict(list)
        self.calls, self.url = [], ""
        self.weights = {} if model is None else load_directory(model)
        self.version = "default"
        self.others = [{} for _ in range(tp_size - 1)]  # weights of the ranks behind the first
        self.models = [FakeModel(self.load_weights), *(FakeModel(loads_into(other)) for other in self.others)]
        self.script = None  # takes streams in place of our weight loader: called with each rank's order
        self.groups = {}
        self.released, self.requests = set(), {}
        self.prefixes = set()
        self.session_open = False
        self.paused, self.dead = None, False
        self.on_request = lambda path: None
        self._go = asyncio.Event()
        for event in (self._go, self.answers):
            event.set()
        self._rids = (f"fake-{number}" for number in itertools.count())
        self._hanging = asyncio.Event()
        self._stuck = threading.Event()
        self._loop = None
        self._runner = None

    async def start(self, port=0):
        self._loop = asyncio.get_running_loop()
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        for method, path, handler in self._routes():
            app.router.add_route(method, path, handler)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def die(self):
        """Everything is reset, nobody listens any more."""
        self.dead = True
        self._stuck.set()
        self._hanging.set()
        self.groups.clear()
        self.forget()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for site in list(self._runner.sites):
            await site.stop()

    async def stop(self):
        self._stuck.set()
        self._hanging.set()
        self.groups.clear()
        self.forget()
        await self._runner.cleanup()

    def forget(self):
        """What its processes keep from update to update, as if they had begun anew."""
        for model in self.models:
            receive_weights.forget(model)

    def count(self, path):
        """How often it was called."""
        return self.calls.count(path)

    @web.middleware
    async def _guard(self, request, handler):
        self.calls.append(request.path)
        self.on_request(request.path)
        if self.frozen:
            await self._hanging.wait()
        open_to_all = request.path.startswith(("/health", "/metrics"))
        if self.api_key and not open_to_all and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        fault = self.faults[request.path].pop(0) if self.faults[request.path] else None
        if fault == "freeze":
            self.frozen = True
        if fault in ("hang", "freeze"):
            await self._hanging.wait()
        if fault == "die":
            await self.die()
        if fault in ("reset", "die", "hang", "freeze") or self.dead:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError(fault)
        if isinstance(fault, int):
            return web.json_response({"error": {"message": f"scripted {fault}"}}, status=fault)
        try:
            return await handler(request)
        except Refused as error:
            return web.json_response({"success": False, "message": str(error)}, status=error.status)

    def _routes(self):
        posts = {
            "/generate": self._generate,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/update_weight_version": self._set_version,
            "/update_weights_from_disk": self._from_disk,
            "/update_weights_from_tensor": self._from_tensor,
            "/update_weights_from_distributed": self._from_distributed,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/weights_checker": self._checksum,
            "/get_weights_by_name": self._by_name,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume_memory,
            "/v1/completions": self._completions,
        }
        if self.bracket:
            posts |= {"/begin_weight_update": self._begin, "/end_weight_update": self._end}
        gets = {"/health": self._health, "/health_generate": self._health, "/model_info": self._model_info}
        gets |= {"/server_info": self._server_info, "/get_model_info": self._model_info}
        yield from (("POST", path, handler) for path, handler in posts.items())
        yield from (("GET", path, handler) for path, handler in gets.items())

    # -- generation ------------------------------------------------------------------------------------------

    async def _generate(self, request):
        body = await request.json()
        answer = await self._answer(body["input_ids"], body.get("sampling_params", {}), body.get("rid"))
        return web.json_response(self._describe(answer, body.get("return_logprob", False)))

    async def _completions(self, request):
        body = await request.json()
        answer = await self._answer(list(body["prompt"].encode()), {"max_new_tokens": body["max_tokens"]}, None)
        reason = answer.finish["type"]
        return web.json_response({"choices": [{"text": str(answer.tokens), "finish_reason": reason}]})

    async def _answer(self, input_ids, sampling, rid):
        if "kv_cache" in self.released:
            await self.die()
            raise ConnectionResetError
        for name in sampling.keys() - SAMPLING_PARAMETERS:
            raise Refused(f"unknown field `{name}`, expected one of {sorted(SAMPLING_PARAMETERS)}")
        if not input_ids:
            raise Refused("input_ids cannot be empty.")
        if max(input_ids) >= self.vocab_size:
            await self.die()  # as the real one on a CPU
            raise ConnectionResetError
        if len(input_ids) >= self.context:
            raise Refused(
                f"The input ({len(input_ids)} tokens) is longer than the model's context length ({self.context})"
            )
        room = min(sampling.get("max_new_tokens", 128), self.context - len(input_ids))
        answer = Request(rid or next(self._rids), input_ids, room, set(sampling.get("stop_token_ids", ())), 0)
        self.requests[answer.rid] = answer
        try:
            await self._go.wait()
            known = (n for n in range(len(input_ids) - 1, 0, -1) if tuple(input_ids[:n]) in self.prefixes)
            answer.cached = next(known, 0)
            while answer.finish is None:
                await self._go.wait()
                if answer.finish is None:
                    self._next_token(answer)
                await asyncio.sleep(self.token_s)
        finally:
            self.requests.pop(answer.rid, None)
        self.prefixes.update(tuple(input_ids[:n]) for n in range(1, len(input_ids) + 1))
        return answer

    def _next_token(self, answer):
        text = f"{self.checksum()} {answer.input_ids} {answer.tokens}"
        token = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % self.vocab_size
        at = len(answer.tokens)
        if not answer.versions or answer.versions[-1]["version"] != self.version:
            answer.versions.append({"version": self.version, "start": at, "end": at})
        answer.tokens.append(token)
        answer.versions[-1]["end"] = at + 1
        if token in answer.stops:
            answer.finish = {"type": "stop", "matched": token}
        elif len(answer.tokens) >= answer.max_new_tokens:
            answer.finish = {"type": "length", "length": answer.max_new_tokens}

    def _describe(self, answer, logprobs):
        meta = {
            "id": answer.rid,
            "finish_reason": answer.finish,
            "prompt_tokens": len(answer.input_ids),
            "completion_tokens": len(answer.tokens),
            "cached_tokens": answer.cached,
            "weight_version": self.version,
            "weight_versions": answer.versions,
        }
        if logprobs:
            meta["output_token_logprobs"] = [[-math.log(2 + token), token, None] for token in answer.tokens]
        return {"text": str(answer.tokens), "output_ids": answer.tokens, "meta_info": meta}

    async def _abort(self, request):
        body = await request.json()
        for answer in list(self.requests.values()):
            if body.get("abort_all") or answer.rid == body.get("rid"):
                answer.finish = {"type": "abort", "message": "Aborted"}
        return web.Response()

    async def _pause(self, request):
        mode = (await request.json()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise Refused("Input should be 'abort', 'retract' or 'in_place'")
        self.paused = mode
        if mode == "abort":
            for answer in self.requests.values():
                answer.finish = {"type": "abort", "message": "Aborted"}
            await eventually(lambda: not self.requests)
        self._go.clear()
        return web.json_response({"status": "ok"})

    async def _continue(self, _):
        self.paused = None
        self._go.set()
        return web.json_response({"status": "ok"})

    async def _flush(self, _):
        if any(answer.tokens for answer in self.requests.values()) and self.paused in (None, "in_place"):
            raise Refused("Flush cache failed.")
        self.prefixes.clear()
        return web.Response(text="Cache flushed.")

    # -- weights ---------------------------------------------------------------------------------------------

    def checksum(self):
        """Of names and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load_weights(self, named):
        """As the model class of the real one."""
        fault = self.faults["bucket"].pop(0) if self.faults["bucket"] else None
        if fault == "raise":
            raise ValueError("scripted: these weights are not taken")
        if fault in ("hang", "freeze"):
            self.frozen = fault == "freeze"
            self._stuck.wait()
        if fault == "die":
            asyncio.run_coroutine_threadsafe(self.die(), self._loop)
        if fault is not None:
            raise Gone
        self.weights.update({name: tensor.clone() for name, tensor in named})

    async def _begin(self, _):
        if self.session_open:
            raise Refused("a weight-update session is already open; call end_weight_update() first")
        self.session_open = True
        return web.json_response({"success": True})

    async def _end(self, _):
        self._needs_session("end_weight_update")
        self.session_open = False
        return web.json_response({"success": True})

    def _needs_session(self, what):
        if self.bracket and not self.session_open:
            raise Refused(f"{what} must run between begin_weight_update() and end_weight_update()")

    async def _from_tensor(self, request):
        body = await request.json()
        self._needs_session("update_weights_from_tensor")
        assert body["flush_cache"] is False and body["load_format"] == RECEIVE_WEIGHTS
        await asyncio.sleep(self.slow_s)
        payloads = [ForkingPickler.loads(base64.b64decode(raw)) for raw in body["serialized_named_tensors"]]
        loads = [asyncio.to_thread(self._load, *rank) for rank in zip(self.models, payloads, strict=True)]
        if any(await asyncio.gather(*loads)) and (self.dead or self.frozen):
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError
        await self.answers.wait()
        return web.json_response({"success": True})

    def _load(self, model, named):
        """Returns whether it was ended."""
        try:
            if self.script is None:
                receive_weights.load(model, named)
            else:
                self.script(json.loads(named[0][0]))
        except Gone:
            return True
        return False

    async def _from_distributed(self, request):
        body = await request.json()
        self._needs_session("update_weights_from_distributed")
        assert body["flush_cache"] is False and body["load_format"] == "flattened_bucket"
        if body["group_name"] not in self.groups:
            raise Refused(f"Group {body['group_name']} not in {list(self.groups)}.")
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        why = await asyncio.to_thread(_receive, self.groups[body["group_name"]][0], flat)
        if why:
            raise Refused(f"Failed to receive weights: {why}")
        start = 0
        for name, dtype, shape, size in zip(body["names"], dtypes, body["shapes"], sizes, strict=True):
            self.load_weights([(name, flat[start : start + size].view(dtype).reshape(shape))])
            start += size
        return web.json_response({"success": True})

    async def _init_group(self, request):
        body = await request.json()
        self.groups[body["group_name"]] = await asyncio.to_thread(_join, body)
        return web.json_response({"success": True})

    async def _destroy_group(self, request):
        if self.groups.pop((await request.json())["group_name"], None) is None:
            raise Refused("The group to be destroyed does not exist.")
        return web.json_response({"success": True})

    async def _from_disk(self, request):
        body = await request.json()
        self.weights = load_directory(body["model_path"])
        self.version = body.get("weight_version", self.version)
        self.prefixes.clear()
        return web.json_response({"success": True})

    async def _set_version(self, request):
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self.version})

    async def _checksum(self, _):
        sums = {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in self.weights.items()
        }
        answer = {"success": True, "ranks": [{"checksums": sums}], "per_engine_checksum": self.checksum()}
        return web.json_response(answer)

    # -- the rest --------------------------------------------------------------------------------------------

    async def _release(self, request):
        if self.requests:
            await self.die()
            raise ConnectionResetError
        self.released.update((await request.json())["tags"])
        return web.Response()

    async def _resume_memory(self, request):
        tags = set((await request.json())["tags"])
        if tags - self.released:
            await self.die()
            raise ConnectionResetError
        self.released -= tags
        return web.Response()

    async def _health(self, request):
        if request.path == "/health_generate":
            await self._go.wait()
        return web.Response()

    async def _model_info(self, _):
        info = {"weight_version": self.version, "model_path": "fake", "is_generation": True}
        return web.json_response(info | self.told.get("model", {}))

    async def _server_info(self, _):
        info = {"version": "0.5.23", "max_total_num_tokens": 16384, "tp_size": 1, "dp_size": 1, "pp_size": 1}
        info["num_running"] = sum(1 for answer in self.requests.values() if answer.tokens)
        return web.json_response(info | self.told.get("server", {}))

    async def _by_name(self, request):
        body = await request.json()
        tensor = self.weights.get(body["name"])
        if tensor is None:
            raise Refused("Get parameter by name failed")
        return web.json_response(tensor[: body["truncate_size"]].tolist())


def load_directory(path):
    """All weights of a Hugging Face directory."""
    files = sorted(Path(path).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _receive(group, flat):
    """Returns why it failed: the error itself would keep the connections open for as long as somebody remembers it."""
    try:
        group.broadcast(flat, 0).wait()
    except RuntimeError as error:
        return str(error)
    return ""


def _join(body):
    """A rank of the group, as SGLang makes it: name as prefix twice, then the device."""
    timeout = timedelta(seconds=30)
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False, timeout)
    prefixed = dist.PrefixStore(f"{body['group_name']}/", dist.PrefixStore(body["group_name"], store))
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
    rank = body["rank_offset"]
    return dist.ProcessGroupGloo(dist.PrefixStore("cpu/", prefixed), rank, body["world_size"], options), store


@asynccontextmanager
async def fake_engine(**options):
    """One that listens; gone at the end."""
    engine = FakeEngine(**options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
