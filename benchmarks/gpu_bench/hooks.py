"""The reward of the runs: imports nothing heavy."""

from __future__ import annotations

from typing import Any


async def low_tokens(args: Any, sample: Any, **_: Any) -> float:
    """The share of the answer's tokens in the lower half of the vocabulary: dense, and known without a tokenizer."""
    half = 75968
    answer = sample.tokens[-sample.response_length :] if sample.response_length else []
    return float(sum(token < half for token in answer) / max(1, len(answer)))
