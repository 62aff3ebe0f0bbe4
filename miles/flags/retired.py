"""``--sglang-*`` spellings that SGLang no longer has, and what they are today. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_TODAY: dict[str, tuple[str, ...] | None] = {
    "--sglang-enable-deepep": ("--sglang-moe-a2a-backend", "deepep"),
    "--sglang-enable-deepep-moe": ("--sglang-moe-a2a-backend", "deepep"),
    "--sglang-disable-piecewise-cuda-graph": ("--sglang-cuda-graph-backend-prefill", "disabled"),
    "--sglang-enforce-piecewise-cuda-graph": ("--sglang-cuda-graph-backend-prefill", "breakable"),
    "--sglang-enable-overlap-schedule": None,  # on unless it is turned off
}
_SPREADS_EXPERTS = "--sglang-enable-ep-moe"


def with_todays_names(argv: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's spelling, and a notice for each word that changed. What is ``known`` stays."""
    words: list[str] = []
    notices = []
    for word in argv:
        if word in known or (word not in _TODAY and word != _SPREADS_EXPERTS):
            words.append(word)
            continue
        today = _TODAY[word] if word in _TODAY else ("--sglang-ep-size", _engine_size(argv))
        words += today or ()
        notices.append(f"{word} is {' '.join(today)} today" if today else f"{word} is the default today: left out")
    return words, notices


def _engine_size(argv: Sequence[str]) -> str:
    """Experts were spread over all ranks of an engine."""
    flag = "--rollout-num-gpus-per-engine"
    for place, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(argv):
            return argv[place + 1]
    return "1"
