"""A sample as a request to ``/generate``, and the answer as part of the sample."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from miles.rollout.engines import engines
from miles.utils.processing_utils import apply_chat_template
from miles.utils.types import Sample, SampleStatus


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """The address of a model's router."""
    routers = getattr(args, "sglang_model_routers", None) or {}
    host, port = routers.get(model_name) or (args.sglang_router_ip, args.sglang_router_port)
    if ":" in str(host) and not str(host).startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{port}{endpoint}"


def generate_url(args: Any) -> str:
    """Where generation goes: the router, or an engine itself for what the router would drop."""
    if getattr(args, "use_rollout_routing_replay", False) or getattr(args, "use_rollout_indexer_replay", False):
        return engines.next_engine_url() + "/generate"
    return get_model_url(args, "default")


def compute_prompt_ids_from_sample(state: Any, sample: Sample, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of the prompt alone; a list of messages goes through the chat template.

    With a processor and media, the tensors of the media go into ``sample.multimodal_train_inputs``.
    """
    prompt = sample.prompt
    if not isinstance(prompt, str):
        kwargs = state.args.apply_chat_template_kwargs or {}
        prompt = apply_chat_template(
            state.tokenizer, prompt, tools=tools if tools is not None else sample.metadata.get("tools"), **kwargs
        )
    if state.processor is not None and sample.multimodal_inputs:
        from miles.utils.processing_utils import extract_multimodal_train_inputs

        output = state.processor(text=prompt, **sample.multimodal_inputs)
        sample.multimodal_train_inputs = extract_multimodal_train_inputs(output)
        return [int(i) for i in output["input_ids"][0]]
    return [int(i) for i in state.tokenizer.encode(prompt, add_special_tokens=False)]


def compute_request_payload(
    args: Any,
    input_ids: list[int],
    sampling_params: dict[str, Any],
    *,
    generated: int = 0,
    multimodal_inputs: dict[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, SampleStatus | None]:
    """The body of a request.

    Args:
        input_ids: Prompt, and what was generated before.
        sampling_params: Of the whole response.
        generated: How many of the response's tokens are there already.
        multimodal_inputs: Media, as base64 or addresses.

    Returns:
        The payload and None; or None and the status of a sample that has no room for another token.
    """
    params = dict(sampling_params)
    room: int | None = params.get("max_new_tokens")
    if room is not None:
        room -= generated
    if args.rollout_max_context_len is not None:
        left = args.rollout_max_context_len - len(input_ids)
        room = left if room is None else min(room, left)
    if room is not None:
        if room <= 0:
            return None, SampleStatus.TRUNCATED
        params["max_new_tokens"] = room
    payload: dict[str, Any] = {"input_ids": input_ids, "sampling_params": params, "return_logprob": True}
    if getattr(args, "use_rollout_routing_replay", False):
        payload["return_routed_experts"] = True
    if getattr(args, "use_rollout_indexer_replay", False):
        payload["return_indexer_topk"] = True
    if multimodal_inputs and multimodal_inputs.get("images"):
        payload["image_data"] = multimodal_inputs["images"]
    return payload, None


def update_sample_from_response(
    args: Any, sample: Sample, payload: dict[str, Any], output: dict[str, Any], *,
    tokenizer: Any = None, update_loss_mask: bool = False,
) -> None:  # fmt: skip
    """Append what an engine answered: tokens, log-probs, text, statistics, status.

    Args:
        payload: The request; its ``input_ids`` become the prompt of a sample that has no tokens yet.
        output: The engine's answer.
        tokenizer: Of a response in several parts: their texts cannot be joined within a character.
        update_loss_mask: The new tokens count for the loss, in a sample that keeps a mask.
    """
    meta = output["meta_info"]
    entries = meta.get("output_token_logprobs") or []
    new_tokens = [int(entry[1]) for entry in entries]
    continued = sample.response_length > 0
    if not sample.tokens:
        sample.tokens = list(payload["input_ids"])
    sample.tokens = sample.tokens + new_tokens
    sample.response_length += len(new_tokens)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [float(entry[0]) for entry in entries]
    if update_loss_mask:
        sample.loss_mask = (sample.loss_mask or []) + [1] * len(new_tokens)
    if continued and tokenizer is not None:
        ids = sample.tokens[len(sample.tokens) - sample.response_length :]
        sample.response = tokenizer.decode(ids, skip_special_tokens=bool(args.rollout_skip_special_tokens))
    else:
        sample.response += output.get("text") or ""
    _take_replay(args, sample, meta)
    sample.update_from_meta_info(args, meta)


def _take_replay(args: Any, sample: Sample, meta: dict[str, Any]) -> None:
    rows = len(sample.tokens) - 1
    if meta.get("routed_experts") is not None:
        flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype=np.int32)
        sample.rollout_routed_experts = flat.reshape(rows, args.num_layers, args.moe_router_topk)
    if meta.get("indexer_topk") is not None:
        flat = np.frombuffer(base64.b64decode(meta["indexer_topk"]), dtype=np.int32)
        sample.rollout_indexer_topk = flat.reshape(rows, int(meta["indexer_topk_num_layers"]), -1)
