"""Spellings that SGLang or Megatron-LM no longer has, and what they are today. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from miles.flags.flag import Flag, grouped, integer, number, switch, text

GROUP = "older spellings"
_ENGINE = "--rollout-num-gpus-per-engine"


def _older(flag: Flag, *today: str) -> Flag:
    text = f"older spelling of {' '.join(today)}" if today != (_DEFAULT,) else "older spelling of what is the default"
    return replace(flag, older=today, help=text)


_DEFAULT = ""

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        _older(switch("--sglang-enable-deepep", ""), "--sglang-moe-a2a-backend", "deepep"),
        _older(switch("--sglang-enable-deepep-moe", ""), "--sglang-moe-a2a-backend", "deepep"),
        _older(switch("--sglang-disable-piecewise-cuda-graph", ""), "--sglang-cuda-graph-backend-prefill", "disabled"),
        _older(switch("--sglang-enforce-piecewise-cuda-graph", ""), "--sglang-cuda-graph-backend-prefill", "breakable"),
        _older(switch("--sglang-enable-overlap-schedule", ""), _DEFAULT),
        _older(switch("--sglang-enable-ep-moe", ""), "--sglang-ep-size", _ENGINE),
    ),
    *grouped(
        GROUP,
        "megatron",
        _older(switch("--recompute-activations", ""), "--recompute-granularity", "selective"),
        _older(
            switch("--checkpoint-activations", ""),
            *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ),
        _older(switch("--use-flash-attn", ""), "--attention-backend", "flash"),
        _older(switch("--use-checkpoint-lr-scheduler", ""), "--use-checkpoint-opt-param-scheduler"),
        _older(switch("--override-lr-scheduler", ""), "--override-opt-param-scheduler"),
        _older(number("--warmup-ratio", None, ""), "--lr-warmup-fraction"),
        _older(integer("--warmup", None, ""), "--lr-warmup-fraction"),
        _older(integer("--batch-size", None, ""), "--micro-batch-size"),
        _older(text("--wandb-exp-name", None, ""), "--wandb-run-name"),
        _older(text("--wandb-save-dir", None, ""), "--wandb-dir"),
        _older(text("--wandb-entity", None, ""), "--wandb-team"),
        _older(integer("--model-parallel-size", None, ""), "--tensor-model-parallel-size"),
    ),
)
"""In ``older``: the words that are read instead. An engine's size stands for its number."""

_TODAY = {name: flag for flag in FLAGS for name in flag.names}


def with_todays_names(argv: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's spelling, and a notice for each word that changed. What is ``known`` stays."""
    words: list[str] = []
    notices = []
    for word in argv:
        name, equals, value = word.partition("=")
        flag = None if name in known else _TODAY.get(name)
        if flag is None:
            words.append(word)
            continue
        today = () if flag.older == (_DEFAULT,) else tuple(_size(part, argv) for part in flag.older)
        words += [*today[:-1], today[-1] + equals + value] if today else []
        notices.append(f"{name} is {' '.join(today)} today" if today else f"{name} is the default today: left out")
    return words, notices


def _size(part: str, argv: Sequence[str]) -> str:
    """Experts were spread over all ranks of an engine."""
    if part != _ENGINE:
        return part
    for place, word in enumerate(argv):
        if word.startswith(_ENGINE + "="):
            return word.partition("=")[2]
        if word == _ENGINE and place + 1 < len(argv):
            return argv[place + 1]
    return "1"
