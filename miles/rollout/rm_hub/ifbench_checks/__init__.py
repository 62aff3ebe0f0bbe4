"""Checks of instructions by id: those of IFEval, of IFBench, and of IFBench's training data (IFTrain).

A check is a function of the response and of the instruction's arguments. It is written from what is published about the
instruction; docs/ifbench.md says what each of them checks, and where they differ from the published code.
"""

from miles.rollout.rm_hub.ifbench_checks import (
    bench_counts,
    bench_custom,
    bench_format,
    bench_words,
    ifeval_shape,
    ifeval_words,
    train_shape,
    train_words,
)
from miles.rollout.rm_hub.ifbench_checks.registry import BUILT, REFUSED, BadInstruction, Instruction, find

SOURCES = (
    ifeval_words, ifeval_shape, bench_counts, bench_words, bench_format, bench_custom, train_words, train_shape,
)  # fmt: skip
"""The modules that fill the registry."""

__all__ = ["BUILT", "REFUSED", "SOURCES", "BadInstruction", "Instruction", "find"]
