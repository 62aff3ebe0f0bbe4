"""Every flag of Megatron-LM's parser that no other table has: refused by name, with the reason of its family.

The names stand in ``megatron_names.json``. What says what is done anyway (a fusion off, no
dropout) stands with the group that it belongs to, not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from importlib.resources import files

from miles.flags.flag import Flag, Kind, Plain, Source

GROUP = "Megatron-LM (refused)"

# The first that matches a flag's name gives the reason.
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"^(num-experts$|moe-)|expert", "not built yet: mixture of experts"),
    (r"^mtp-", "not built yet: multi-token prediction"),
    (r"pipeline|virtual-stages|p2p-comm|microbatch-group|phase-transition", "not built yet: pipeline parallel"),
    (r"context-parallel|cp-comm|dp-cp", "not built yet: context parallel"),
    (r"multi-latent|lora-rank|qk-head-dim|qk-pos-emb|v-head-dim|mscale|mla", "not built yet: multi-latent attention"),
    (
        r"^recompute|checkpoint-activations|saved-activations|activation-offload|offload-modules|min-offloaded",
        "not built yet: activation recomputation",
    ),
    (
        r"fp8|fp4|mxfp8|quant|kitchen|bf16-reduced|layers-(at-)?\w+-?(in-)?bf16|te-precision",
        "not built yet: FP8 and FP4",
    ),
    (r"loss-scale|hysteresis|initial-loss|min-loss", "not built yet: float16 and its loss scaling"),
    (r"(first-last|num)-layers.*bf16", "not built yet: FP8 and FP4"),
    (r"muon", "not built yet: the Muon optimizer"),
    (
        r"^(main-grads|main-params|exp-avg)|precision-aware|offload-fraction|cpu-offload|pin-cpu",
        "not built yet: optimizer state on the CPU or in lower precision",
    ),
    (
        r"^(use-megatron-fsdp|fsdp|torch-fsdp2|use-torch-fsdp2|data-parallel-sharding|outer-dp|hsdp)|fsdp|hsdp",
        "the FSDP backend is --train-backend fsdp",
    ),
    (r"^rl-|^grpo-|^langrl|perform-rl|refit-method", "it belongs to Megatron-LM's own RL loop, which ours replaces"),
    (
        r"inference|flash-decode|max-tokens-to-oom|static-engine|chunked-prefill|prefill|decode-only|mamba-inference",
        "SGLang generates: see --sglang-*",
    ),
    (
        r"mamba|hybrid|linear-|gated-delta|dsa|experimental-attention|heterogeneous|window|softmax-type|attention-output-gate|qk-l2|qk-clip",
        "not built yet: model families beyond Qwen2, Qwen3 and Llama",
    ),
    (
        r"tensorboard|wandb|one-logger|app-tag|log-|logging|timing|straggler|workload-inspector|profile|record-memory|energy",
        "not built yet: Megatron-LM's logging; metrics.jsonl and the console show the run",
    ),
    (
        r"inprocess|ft-|calc-ft|error-injection|rerun|spiky|replication|non-persistent|result-rejected|weight-hash|autoresume|large-grads",
        "not built yet: Megatron-LM's own fault tolerance",
    ),
    (
        r"data-path|data-args|dataloader|dataset|split|mock-data|fim-|mask-prob|short-seq|sample-rate|reset-|eod|num-workers|data-cache|mmap|object-storage|ambiguous|sft|full-validation|validation-sets|per-dataset",
        "prompts come from --prompt-data",
    ),
    (r"tokenizer|tiktoken|vocab-file|merge-file|vocab-extra", "the tokenizer is that of --hf-checkpoint"),
    (
        r"^(ict|bert|biencoder|titles|query-in|use-one-sent|evidence|retriever|block-data|embedding-path|indexer)",
        "Megatron-LM's retrieval models are not trained here",
    ),
    (
        r"^(num-classes|img|num-channels|patch-dim|classes-|data-per|no-data-sharding|head-lr|vision|swin|mask-type|mask-factor|iter-per|dino|mrope)",
        "not built yet: vision models",
    ),
    (
        r"ckpt|checkpoint|msc|load-main|save-(w|d)grads|save-retain|exit-on-missing",
        "checkpoints are written and read by the backend's own driver",
    ),
    (
        r"overlap|tp-comm|ddp-|align-|nccl|sharp|symmetric|gloo|group|bucket|ring-exchange|scatter-gather|communication|tp-pp-dp|average-in|reduce-scatter|wgrad|gradient-reduce|reduce-in|optimizer-instances",
        "not built yet: tuning of Megatron's communication",
    ),
    (
        r"cuda-graph|fusion|fused|jit|te-|onnx|persist|rng-tracker|deterministic|batch-invariant|config-logger|experimental|openai-gelu|squared-relu|quick-geglu|glu-linear|activation-func|layernorm|norm|residual|embedding|position|rotary|rope|init|xavier|scaling|bias",
        "not built yet, or not part of Qwen2, Qwen3 and Llama models",
    ),
    (
        r"train-|batch|exit|eval|iterations|skip-train|test-mode|gc|empty-unused|epoch|seq-length|encoder|decoder|yaml|model-parallel-size|warmup|decoupled|rampup|local-rank|lazy|fake",
        "the training loop is ours, and counts rollouts",
    ),
)


@cache
def megatron_rows() -> tuple[tuple[tuple[str, ...], str, str, str | None, Plain], ...]:
    """Names, dest, action, type and default of all flags of Megatron-LM's parser."""
    table = json.loads(files("miles.flags").joinpath("megatron_names.json").read_text())
    return tuple((tuple(row[0]), row[1], row[2], row[3], row[4]) for row in table["flags"])


def reason_for(name: str) -> str:
    """Why this flag of Megatron-LM is not taken."""
    for pattern, reason in _FAMILIES:
        if re.search(pattern, name.removeprefix("--")):
            return reason
    return "not built yet"


def refused_megatron_flags(taken: Collection[str]) -> tuple[Flag, ...]:
    """A refused flag for each row of which no name is in ``taken``."""
    kinds: dict[str, Kind] = {"StoreTrue": "switch", "StoreFalse": "off", "BooleanOptional": "tri"}
    source: Source = "megatron"
    return tuple(
        Flag(
            names[:1] if action == "BooleanOptional" else names,
            dest,
            kinds.get(action, "str"),
            default,
            group=GROUP,
            nargs=None if action in kinds else "*",
            source=source,
            only=(),
            reason=reason_for(names[0]),
        )
        for names, dest, action, _, default in megatron_rows()
        if not set(names) & set(taken)
    )
