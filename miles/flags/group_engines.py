"""Flags: SGLang's engines and the router before them. ``--sglang-*`` and ``--router-*`` beyond these are the installed
packages' own: see ``passthrough``."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, off, path, refused, switch, text

GROUP = "engines and router"
_OF_FUNCTIONS = frozenset(
    {
        "--custom-agent-function-path",
        "--generate-execute-tool-function-path",
        "--generate-max-turns",
        "--generate-tool-call-parser",
        "--generate-tool-specs-path",
        "--max-seq-len",
    }
)
"""Flags that generate functions add to the parser."""
_OF_AGENTS = ("--custom-agent-function-path", "--max-seq-len")
MILES_ROUTER = "the router is sglang-router"
MERGED = "engines get the adapter merged into their weights, and serve no other"
MULTI_LORA = "not built yet: several adapters at once (multi-LoRA)"

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text("--sglang-router-ip", None, "a router that runs already (unset: one is started)"),
        integer("--sglang-router-port", None, "its port, or the port of the one that is started"),
    ),
    *grouped(
        GROUP,
        "reference",
        integer("--sglang-server-concurrency", 512, "most requests in flight per engine"),
        text("--sglang-router-policy", None, "how the router chooses an engine"),
        integer("--sglang-router-request-timeout-secs", 14400, "the router's deadline of a request"),
        path("--sglang-config", "YAML of groups of engines, each with settings of its own; base64:... is taken too"),
        refused(integer("--prefill-num-servers", None, "prefill servers"), "not built yet: prefill and decode apart"),
        refused(switch("--use-miles-router", "another router"), MILES_ROUTER),
        refused(number("--miles-router-timeout", None, "its deadline"), MILES_ROUTER),
        refused(integer("--miles-router-max-connections", None, "its connections"), MILES_ROUTER),
        refused(integer("--miles-router-health-check-failure-threshold", 3, "its patience"), MILES_ROUTER),
        refused(switch("--recompute-logprobs-via-prefill", "score responses again"), "not built yet"),
        refused(off("--no-sglang-lora-use-virtual-experts", "sglang_lora_use_virtual_experts", "kind of LoRA"), MERGED),
    ),
    *grouped(
        GROUP,
        "ours",
        number("--update-weight-timeout", 600.0, "seconds that an engine may take for a part of a weight update"),
        number("--update-weight-silence-timeout", 60.0, "seconds that it may say nothing at all meanwhile"),
    ),
    *grouped(
        "multi-token prediction",
        "contract",
        integer("--mtp-num-layers", 0, "layers of the checkpoint that predict further tokens (0: they are left out)"),
        switch("--enable-mtp-training", "train them beside the model, which they do not change"),
        number("--mtp-loss-scaling-factor", 0.2, "weight of their loss"),
    ),
    *grouped(
        "LoRA",
        "reference",
        integer("--lora-rank", 0, "rank of the adapters that are trained in place of the weights (0: none)"),
        integer("--lora-alpha", 16, "what an adapter adds is scaled by this, divided by the rank"),
        number("--lora-dropout", 0.0, "share of an adapter's input that is left out in training"),
        text(
            "--lora-type",
            "lora",
            "whether layers that Megatron joins (q, k, v; gate, up) share their A, or each has its own",
            choices=("lora", "canonical_lora"),
        ),
        text("--target-modules", None, "layers with an adapter: all-linear, or names with commas between"),
        text("--exclude-modules", None, "of these, the ones without"),
        path("--lora-adapter-path", "directory of an adapter in peft's layout to begin with"),
        refused(switch("--lora-sync-from-tensor", "send adapters as tensors"), MERGED),
        refused(switch("--lora-base-cpu-backup", "base weights on the CPU"), MERGED),
        refused(switch("--lora-train-only", "do not serve adapters"), MERGED),
        refused(
            switch("--experts-shared-outer-loras", "layout for experts"), "not built yet: adapters shared by experts"
        ),
        refused(integer("--multi-lora-n-adapters", 0, "adapters"), MULTI_LORA, only=(0,)),
        refused(text("--multi-lora-adapter", [], "NAME CONFIG", nargs="+"), MULTI_LORA),
        refused(number("--multi-lora-idle-poll-s", 5.0, "poll"), MULTI_LORA),
        refused(text("--multi-lora-http-server-path", None, "class"), MULTI_LORA),
        refused(text("--multi-lora-backend-path", None, "class"), MULTI_LORA),
        refused(integer("--multi-lora-api-port", 8068, "port"), MULTI_LORA),
        refused(off("--multi-lora-disable-service-mode", "multi_lora_service_mode", "end when done"), MULTI_LORA),
        refused(integer("--multi-lora-max-adapter-global-batch-size", None, "bound"), MULTI_LORA),
        refused(number("--multi-lora-max-coalesce-wait-s", 0.5, "wait"), MULTI_LORA),
        refused(number("--multi-lora-max-empty-wait-s", 30.0, "wait"), MULTI_LORA),
    ),
)


def reason_for_absent(name: str) -> str:
    """Why a flag of the reference system that is in no table is not taken; empty: it is none of those."""
    if name in _OF_FUNCTIONS:
        function = "agentic_tool_call" if name in _OF_AGENTS else "multi_turn"
        return f"it is a flag of --custom-generate-function-path miles.rollout.generate_hub.{function}.generate"
    return "not built yet: engines for evaluation only" if name.startswith("--eval-sglang-") else ""
