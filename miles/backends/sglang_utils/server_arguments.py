"""SGLang's and the router's arguments from the run's configuration. Pure: plain values in, plain values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from miles_agents.errors import ConfigError

T = TypeVar("T")
RECEIVE_WEIGHTS = "miles.backends.sglang_utils.receive_weights.load"
"""The weight loader of ours that an engine is given: the ``load_format`` of its updates."""

CPU_CACHE_BYTES = 1 << 30
"""The most that the KV cache of an engine on a CPU takes unless a flag says otherwise."""
_MIN_CACHE_TOKENS = 16384

_NOT_SERVER_ARGUMENTS = ("sglang_server_concurrency", "sglang_config", "sglang_api_key")  # the key goes another way
_CIRCUIT_BREAKER = {
    "router_cb_failure_threshold": 10,
    "router_cb_success_threshold": 3,
    "router_cb_timeout_duration_secs": 60,
    "router_cb_window_duration_secs": 120,
}
"""The router's defaults: who sets another number wants its circuit breaker."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class BadEngineConfig(ConfigError):
    """Flags about engines that cannot work, or that this version does not serve."""

    code = "E-ENG-001"


def server_arguments(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Fields of SGLang's ``ServerArgs`` for engine ``rank``; host, ports and key are the launcher's to add.

    What is forced comes from the run (model, seed, parallel sizes, memory saver, metrics); everything else that a
    ``--sglang-*`` flag set is passed on, the overrides of the engine's group (``--sglang-config``) last; where it set
    nothing, a CPU gets what works on one.

    Raises:
        BadEngineConfig: a combination that cannot be started.
    """
    typed = {
        key.removeprefix("sglang_"): value
        for key, value in config.items()
        if key.startswith("sglang_")
        and not key.startswith("sglang_router_")
        and key not in _NOT_SERVER_ARGUMENTS
        and value is not None
    }
    typed |= group_of(config, rank).get("overrides") or {}
    on_cpu = config["device"] == "cpu"
    _check(typed)
    arguments = typed | _forced(config, rank, on_cpu=on_cpu)
    if arguments.get("dtype", "auto") == "auto":
        arguments["dtype"] = config["params_dtype"]
    arguments.setdefault("log_level_http", "warning")
    arguments["custom_weight_loader"] = [*(arguments.get("custom_weight_loader") or []), RECEIVE_WEIGHTS]
    return _with_cpu_defaults(arguments, config) if on_cpu else arguments


def takes_stream(arguments: Mapping[str, Any]) -> bool:
    """Whether an engine with these arguments takes weights by stream: one that speculates loads two models by one
    request."""
    return not arguments.get("speculative_algorithm")


def _forced(config: Mapping[str, Any], rank: int, *, on_cpu: bool) -> dict[str, Any]:
    return {
        "model_path": config["hf_checkpoint"],
        "trust_remote_code": True,
        "random_seed": int(config.get("seed") or 0) + rank,
        "device": config["device"],
        "enable_memory_saver": bool(config.get("offload_rollout")) and not on_cpu,
        "nnodes": 1,
        "node_rank": 0,
        "base_gpu_id": 0,  # the process sees its own devices only
        "gpu_id_step": 1,
        "tp_size": engine_size(config, rank),
        "skip_server_warmup": True,
        "enable_draft_weights_cpu_backup": not on_cpu,
        "enable_metrics": True,
        **({"enable_return_routed_experts": True} if config.get("use_rollout_routing_replay") else {}),
    }


def _with_cpu_defaults(arguments: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_total_tokens": cache_tokens(config),
    }
    # An idle scheduler that does not sleep burns most of a core.
    return defaults | arguments | {"sleep_on_idle": True}


def group_of(config: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """The group of engine ``rank``: ``num_gpus_per_engine``, ``overrides``; empty where all engines are alike."""
    first = 0
    for group in config.get("engine_groups") or ():
        first += group["num_engines"]
        if rank < first:
            return dict(group)
    return {}


def engine_size(config: Mapping[str, Any], rank: int) -> int:
    """Ranks of engine ``rank``."""
    return int(group_of(config, rank).get("num_gpus_per_engine") or config.get("rollout_num_gpus_per_engine") or 1)


def rank_offset(config: Mapping[str, Any], rank: int) -> int:
    """Place of the engine's first rank in a process group of trainer rank 0 and all engines."""
    return 1 + sum(engine_size(config, before) for before in range(rank))


def slots_of_engines(config: Mapping[str, Any], slots: Sequence[Sequence[T]]) -> list[list[T]]:
    """Slots by engine. Where there are groups, each of ``slots`` has one device, and they are dealt out in order."""
    if not config.get("engine_groups"):
        return [list(of_engine) for of_engine in slots]
    left, dealt = [slot for of_device in slots for slot in of_device], []
    for rank in range(int(config["rollout_num_engines"])):
        size = engine_size(config, rank)
        dealt.append(left[:size])
        left = left[size:]
    return dealt


def cache_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that the KV cache of an engine on a CPU holds: what its requests can need at once, within a gigabyte."""
    model = config["hf_config"]
    context = int(config.get("sglang_context_length") or model.get("max_position_embeddings") or 4096)
    samples = int(config.get("rollout_batch_size") or 1) * int(config.get("n_samples_per_prompt") or 1)
    at_once = min(samples, int(config.get("sglang_server_concurrency") or samples))
    heads = int(model.get("num_key_value_heads") or model["num_attention_heads"])
    head_dim = int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])
    per_token = 2 * int(model["num_hidden_layers"]) * heads * head_dim * _BYTES.get(config["params_dtype"], 4)
    affordable = CPU_CACHE_BYTES // per_token
    return max(2 * context, min(affordable, max(_MIN_CACHE_TOKENS, at_once * context)))


def router_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``launch_router`` takes: ``router_*`` values by flag. ``--sglang-router-*`` wins over ``--router-*``."""
    arguments = {key: value for key, value in config.items() if key.startswith("router_") and value is not None}
    arguments.pop("router_api_key", None)  # goes another way
    for own, theirs in (
        ("sglang_router_policy", "router_policy"),
        ("sglang_router_request_timeout_secs", "router_request_timeout_secs"),
    ):
        if config.get(own) is not None:
            arguments[theirs] = config[own]
    arguments.setdefault("router_log_level", "warn")
    # It would turn away every request for a minute after a few that failed, also where there is one engine. What is
    # gone leaves the router by other means, and requests that fail are sent again.
    if all(arguments.get(name, default) == default for name, default in _CIRCUIT_BREAKER.items()):
        arguments["router_disable_circuit_breaker"] = True
    return arguments


def _check(typed: Mapping[str, Any]) -> None:
    for name, values in (("pp_size", (None, 1)), ("dp_size", (None, 1)), ("nnodes", (None, 1))):
        if typed.get(name) not in values:
            flag = f"--sglang-{name.replace('_', '-')}"
            raise BadEngineConfig(
                f"{flag} {typed[name]} is not served",
                evidence="weight updates reach engines of one node, tensor parallel only",
                advice=f"Leave {flag} out; use more engines (--rollout-num-gpus) instead.",
            )
    if typed.get("admin_api_key"):
        raise BadEngineConfig(
            "--sglang-admin-api-key is not served",
            evidence="with it engines take weight updates from nobody who has only the run's key",
            advice="Leave it out: every run makes a key of its own.",
        )
