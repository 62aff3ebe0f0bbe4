"""Responses that follow an instruction and responses that do not, by instruction."""

from support.instruction_cases import (
    bench_counts,
    bench_custom,
    bench_format,
    bench_words,
    edges,
    ifeval_shape,
    ifeval_words,
    near_misses,
    train,
)

CASES = [
    (name, kwargs, verdict, text)
    for module in (
        ifeval_words,
        ifeval_shape,
        bench_counts,
        bench_words,
        bench_format,
        bench_custom,
        train,
        edges,
        near_misses,
    )
    for name, kwargs, follow, break_it in module.TABLE
    for verdict, texts in ((True, follow), (False, break_it))
    for text in texts
]
"""(id, kwargs, whether it is followed, response)"""
