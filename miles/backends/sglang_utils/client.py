"""An SGLang engine over HTTP, for asyncio. Imports no torch.

* Consumes: the engine's URL and API key. Produces: its answers as plain values, or errors with the server's own words.
* Waits for: answers, each call with a deadline.
* Invariant: nothing goes out that would end the server: no token outside of its vocabulary (where ``vocab_size`` is
  given), no release of memory while it is busy, no resumption of what was not released.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import aiohttp

from miles_agents.errors import ConfigError, PeerFault

PauseMode = Literal["abort", "retract", "in_place"]
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
CALL_S = 60.0
"""Deadline of calls that do little."""
LOAD_S = 1800.0
"""Deadline of calls that move a model."""
_FLUSH_EVERY_S = 0.1
_SHOWN = 2000


class EngineRefused(PeerFault):
    """An engine (or the router) answered a call with an error."""

    code = "E-ENG-002"


class EngineSilent(PeerFault):
    """An engine (or the router) gave no answer: no connection, a broken one, or none in time."""

    code = "E-ENG-003"


class WouldEndEngine(ConfigError):
    """A request that an engine does not survive; it was not sent."""

    code = "E-ENG-004"


class HttpCaller:
    """JSON over HTTP with one server. Close it, or use it as an async context manager."""

    def __init__(self, url: str, api_key: str = "", *, name: str = "") -> None:
        self.url = url.rstrip("/")
        self.name = name or self.url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpCaller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give its connections back."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = CALL_S,
        expected: Sequence[int] = (200,),
    ) -> tuple[int, Any]:
        """One request. Returns its status and what it answered: JSON decoded, else text.

        Raises:
            EngineRefused: another status than ``expected``, with the server's message.
            EngineSilent: no answer, or not all of it within ``timeout_s``.
        """
        if self._session is None:
            # Generation has as many requests open as the caller wants; the limit is not ours to set.
            self._session = aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(limit=0))
        try:
            async with self._session.request(
                method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as answer:
                status, text = answer.status, await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            why = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            raise EngineSilent(
                f"{self.name} did not answer {method} {path}",
                evidence=f"{self.url}: {why or type(error).__name__}",
                advice=f"Read the log of {self.name}; the first error in it is usually the cause.",
                engine=self.name,
            ) from error
        value = _decoded(text)
        if status not in expected:
            raise EngineRefused(
                f"{self.name} refused {method} {path} with status {status}",
                evidence=message_of(value)[:_SHOWN] or "(empty answer)",
                advice=_advice(status, self.name),
                engine=self.name,
                status=status,
            )
        return status, value


class EngineClient(HttpCaller):
    """One engine. See the module's docstring.

    Args:
        vocab_size: Rows of its embedding; None: token ids are not looked at.
    """

    def __init__(self, url: str, api_key: str = "", *, name: str = "", vocab_size: int | None = None) -> None:
        super().__init__(url, api_key, name=name)
        self.vocab_size = vocab_size
        self._released: set[str] = set()

    async def __aenter__(self) -> EngineClient:
        return self

    # -- generation ------------------------------------------------------------------------------------------

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        rid: str | None = None,
        return_logprob: bool = True,
        timeout_s: float = LOAD_S,
        **more: Any,
    ) -> dict[str, Any]:
        """One answer: ``text``, ``output_ids``, ``meta_info`` as SGLang has them. ``more``: further request fields."""
        check_tokens(input_ids, self.vocab_size, self.name)
        body = {"input_ids": list(input_ids), "sampling_params": dict(sampling_params), **more}
        body["return_logprob"] = return_logprob
        if rid is not None:
            body["rid"] = rid
        return dict((await self.call("POST", "/generate", body, timeout_s=timeout_s))[1])

    async def abort(self, rid: str) -> None:
        """End one request; it answers with what it has. Unknown ids are ignored."""
        await self.call("POST", "/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        """End all requests."""
        await self.call("POST", "/abort_request", {"abort_all": True})

    # -- pausing ---------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Generate nothing until ``resume``. ``retract`` keeps requests but gives their cache back."""
        await self.call("POST", "/pause_generation", {"mode": mode}, timeout_s=LOAD_S if mode == "abort" else CALL_S)

    async def resume(self) -> None:
        """Generate again."""
        await self.call("POST", "/continue_generation", {})

    async def flush_cache(self, *, timeout_s: float = CALL_S) -> None:
        """Forget cached prefixes. Waits while requests run. Raises EngineRefused if they still do at the end."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            last = asyncio.get_running_loop().time() >= deadline
            expected = (200,) if last else (200, 400)
            if (await self.call("POST", "/flush_cache", expected=expected))[0] == 200:
                return
            await asyncio.sleep(_FLUSH_EVERY_S)

    # -- weights ---------------------------------------------------------------------------------------------

    async def has_bracket(self) -> bool:
        """Whether weight updates have to stand between ``begin_weight_update`` and ``end_weight_update``."""
        # POST only, so GET tells 405 from 404 without doing anything.
        return (await self.call("GET", "/begin_weight_update", expected=(200, 404, 405)))[0] != 404

    async def begin_weight_update(self) -> None:
        """Make weights loadable."""
        await self.call("POST", "/begin_weight_update", {}, timeout_s=LOAD_S)

    async def end_weight_update(self) -> None:
        """Finish what was loaded."""
        await self.call("POST", "/end_weight_update", {}, timeout_s=LOAD_S)

    async def update_weight_version(self, version: int | str) -> None:
        """Name the weights: answers carry this name from now on. Running requests go on."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self.call("POST", "/update_weight_version", body)

    async def update_weights_from_disk(self, path: str, *, version: int | str | None = None) -> None:
        """Load all weights from a Hugging Face directory."""
        body: dict[str, Any] = {"model_path": path, "flush_cache": True}
        if version is not None:
            body["weight_version"] = str(version)
        await self.call("POST", "/update_weights_from_disk", body, timeout_s=LOAD_S)

    async def init_weights_update_group(
        self, host: str, port: int, *, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join a process group as ranks ``rank_offset``, ...; returns when all have joined."""
        body = {"master_address": host, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        body |= {"group_name": group_name, "backend": backend}
        await self.call("POST", "/init_weights_update_group", body, timeout_s=LOAD_S)

    async def destroy_weights_update_group(self, group_name: str) -> bool:
        """Leave a process group. Returns whether it was in one."""
        body = {"group_name": group_name}
        return (await self.call("POST", "/destroy_weights_update_group", body, expected=(200, 400)))[0] == 200

    async def checksums(self) -> tuple[str, list[dict[str, str]]]:
        """Of all weights as they lie there: one for the engine, and by rank and parameter name."""
        answer = (await self.call("POST", "/weights_checker", {"action": "checksum"}, timeout_s=LOAD_S))[1]
        return str(answer["per_engine_checksum"]), [dict(rank["checksums"]) for rank in answer["ranks"]]

    # -- memory ----------------------------------------------------------------------------------------------

    async def release_memory(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Give memory back (CUDA with the memory saver). Flushes first, and does nothing where that shows it busy.

        Raises:
            EngineRefused: it is busy.
        """
        await self.flush_cache()
        await self.call("POST", "/release_memory_occupation", {"tags": list(tags)}, timeout_s=LOAD_S)
        self._released.update(tags)

    async def resume_memory(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Take memory back; tags that were not released by this client are left out."""
        wanted = [tag for tag in tags if tag in self._released]
        if wanted:
            await self.call("POST", "/resume_memory_occupation", {"tags": wanted}, timeout_s=LOAD_S)
            self._released.difference_update(wanted)

    # -- what it is ------------------------------------------------------------------------------------------

    async def model_info(self) -> dict[str, Any]:
        """Model, tokenizer, ``weight_version``. Answers while generation is paused, too."""
        return dict((await self.call("GET", "/model_info"))[1])

    async def server_info(self) -> dict[str, Any]:
        """All arguments as resolved, version, state of the scheduler."""
        return dict((await self.call("GET", "/server_info"))[1])

    async def health(self, *, generate: bool = False, timeout_s: float = CALL_S) -> bool:
        """Whether it says that it is well. ``generate``: by generating a token, which hangs while it is paused."""
        path = "/health_generate" if generate else "/health"
        try:
            await self.call("GET", path, timeout_s=timeout_s)
        except (EngineRefused, EngineSilent):
            return False
        return True


def check_tokens(input_ids: Sequence[int], vocab_size: int | None, name: str) -> None:
    """Raises WouldEndEngine if the prompt is empty or has a token that the model does not have."""
    worst = max(input_ids, default=-1)
    if input_ids and min(input_ids) >= 0 and (vocab_size is None or worst < vocab_size):
        return
    bad = [token for token in input_ids if token < 0 or (vocab_size is not None and token >= vocab_size)]
    raise WouldEndEngine(
        f"a prompt for {name} has tokens that its model does not have" if bad else f"a prompt for {name} is empty",
        evidence=f"vocabulary: {vocab_size} tokens; of {len(input_ids)} in the prompt, outside: {bad[:10]}",
        advice="Use the tokenizer of the model that the engines serve (--hf-checkpoint).",
    )


def message_of(value: Any) -> str:
    """The words in an error answer, whichever of SGLang's and the router's forms it has."""
    if isinstance(value, dict):
        for key in ("error", "message", "detail"):
            if key in value:
                return message_of(value[key])
        return json.dumps(value)
    return str(value)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _advice(status: int, name: str) -> str:
    if status == 401:
        return "Send the API key of the run: engines and router take no request without it."
    if status >= 500:
        return f"Read the log of {name}; the first error in it is usually the cause."
    return "Change what the evidence names."
