"""Results as Markdown: a summary against what is asked, a table per question, the circumstances. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from main_job_bench import figures
from main_job_bench.figures import (
    GENERATION,
    LOG_PROBS,
    OURS,
    OURS_WIDE,
    PARTS,
    PEERS,
    REST,
    TRAINING,
    TRL,
    TRL_WIDE,
    UPDATE,
    Results,
    Run,
    Spread,
    Update,
)
from main_job_bench.sizes import Size, tokens_per_iteration
from runtime_bench.report import number, table

BEGIN = "<!-- begin: written by benchmarks/main_job.py -->"
END = "<!-- end: written by benchmarks/main_job.py -->"
PART_TITLES = {
    GENERATION: "generation",
    LOG_PROBS: "log-probs of the policy that generated",
    TRAINING: "forward, backward, optimizer",
    UPDATE: "weight update",
    REST: "everything else",
}
_NOTHING = "-"


class MarkersMissing(Exception):
    """A document has no place for the tables."""


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between its markers. Raises MarkersMissing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersMissing(f"no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def markdown(results: Results) -> str:
    """All of it."""
    titles = column_titles(results)
    parts = [_summary(results, titles), _iterations(results, titles), _samples(results, titles), _update(results)]
    return "\n\n".join([*filter(None, parts), _circumstances(results)]) + "\n"


def column_titles(results: Results) -> dict[str, str]:
    """Headings of the columns."""
    cores = results.threads
    return {
        OURS: "ours, 1 rank, 1 engine",
        OURS_WIDE: f"ours, {cores} ranks, {cores} engines",
        TRL: "TRL, 1 thread",
        TRL_WIDE: f"TRL, {cores} threads",
    }


def _summary(results: Results, titles: dict[str, str]) -> str:
    rows = []
    for column in (OURS, OURS_WIDE):
        found = figures.over(results.of(column), lambda run: run.share(REST))
        if found is not None:
            bound = figures.MAX_REST_SHARE
            verdict = figures.at_most(found.median, bound)
            rows.append(
                [f"everything else in an iteration ({titles[column]})", _percent(found.median), "10 %", verdict]
            )
    for column in (OURS, OURS_WIDE):
        ratio = figures.samples_ratio(results, column)
        if ratio is not None:
            rows.append(
                [
                    f"samples per second against TRL at its best ({titles[column]})",
                    f"{number(ratio)}x",
                    "reported",
                    _NOTHING,
                ]
            )
    times = figures.spread(one.times_memcpy for one in results.updates)
    if times is not None:
        verdict = figures.at_most(times.median, figures.MAX_TIMES_MEMCPY)
        rows.append(["weight update: moving the bytes", f"{number(times.median)}x memcpy", "4x memcpy", verdict])
    if not rows:
        return "#### Summary\n\nNothing was measured."
    return "#### Summary\n\n" + table(["measured", "figure", "asked", "verdict"], rows)


def _iterations(results: Results, titles: dict[str, str]) -> str:
    columns = [column for column in (OURS, OURS_WIDE) if results.of(column)]
    if not columns:
        return ""
    rows = []
    for part in PARTS:
        cells = []
        for column in columns:
            runs = results.of(column)
            cells.append(_seconds(figures.over(runs, _mean_of(part))))
            cells.append(_percents(figures.over(runs, _share_of(part))))
        rows.append([PART_TITLES[part], *cells])
    walls = [figures.over(results.of(column), lambda run: run.seconds / len(run.iterations)) for column in columns]
    rows.append(["an iteration", *(cell for wall in walls for cell in (_seconds(wall), "100 %"))])
    header = ["", *(heading for column in columns for heading in (titles[column], "share"))]
    text = "#### Where an iteration's time goes\n\n" + table(header, rows)
    detail = _detail([results.of(column) for column in columns], [titles[column] for column in columns])
    return f"{text}\n\n{detail}" if detail else text


def _detail(columns: Sequence[Sequence[Run]], titles: Sequence[str]) -> str:
    """The job's own clocks, as ``metrics.jsonl`` has them; some lie within others."""
    names = list(
        dict.fromkeys(name for runs in columns for run in runs for one in run.iterations for name in one.detail)
    )
    rows = []
    for name in names:
        cells = []
        for runs in columns:
            values = (one.detail[name] for run in runs for one in run.iterations if name in one.detail)
            found = figures.spread(values)
            cells.append(_NOTHING if found is None else _span(found.median))
        if any(cell not in (_NOTHING, _span(0.0)) for cell in cells):
            rows.append([f"`perf/{name}_time`", *cells])
    if not rows:
        return ""
    return "Median of the job's own clocks, some of which lie within others:\n\n" + table(["", *titles], rows)


def _samples(results: Results, titles: dict[str, str]) -> str:
    columns = [column for column in (OURS, OURS_WIDE, *PEERS) if results.of(column)]
    if not columns:
        return ""
    whole: list[tuple[str, Callable[[Run], float], Callable[[float], str]]] = [
        ("samples per second", lambda run: run.samples_per_second, number),
        ("answer tokens per second", lambda run: run.tokens_per_second, number),
        ("tokens per answer", lambda run: run.tokens_per_sample, number),
        ("seconds per iteration", lambda run: run.seconds / len(run.iterations), _span),
    ]
    rows = [[title, *(_cell(results, column, figure, text) for column in columns)] for title, figure, text in whole]
    for part in PARTS:
        cells = [_cell(results, column, _mean_of(part), _span) for column in columns]
        rows.append([f"of which {PART_TITLES[part]}", *cells])
    rows.append(
        [
            "start-up, until the first iteration begins",
            *(_cell(results, c, lambda run: run.start_up, _span) for c in columns),
        ]
    )
    return "#### Samples per second, end to end\n\n" + table(["", *(titles[column] for column in columns)], rows)


def _mean_of(part: str) -> Callable[[Run], float]:
    return lambda run: run.mean(part)


def _share_of(part: str) -> Callable[[Run], float]:
    return lambda run: run.share(part)


def _cell(results: Results, column: str, figure: Callable[[Run], float], text: Callable[[float], str]) -> str:
    found = figures.over(results.of(column), figure)
    return _NOTHING if found is None else _with_range(found, text)


def _update(results: Results) -> str:
    updates = results.updates
    if not updates:
        return ""
    wanted: list[tuple[str, Callable[[Update], float]]] = [
        ("memcpy of the same bytes, one process, in between", lambda one: one.memcpy),
        ("moving the bytes", lambda one: one.moving),
        ("of which making tensors as Hugging Face names them", lambda one: one.gathering),
        ("of which filling the shared memory", lambda one: one.copying),
        ("of which the engine's loading", lambda one: one.loading),
        ("the calls around", lambda one: one.calls),
        ("the update, from asking to the new version", lambda one: one.total),
    ]
    base = figures.spread(one.memcpy for one in updates)
    rows = []
    for title, figure in wanted:
        found = figures.spread(figure(one) for one in updates)
        if found is not None and base is not None:
            rows.append([title, _with_range(found, _span), f"{number(found.median / base.median)}x"])
    mib = updates[0].num_bytes / (1 << 20)
    names = list(dict.fromkeys(name for one in updates for name in one.detail))
    detail = []
    for name in names:
        found = figures.spread(one.detail[name] for one in updates if name in one.detail)
        if found is not None:
            detail.append(f"{name} {_span(found.median)}")
    text = f"#### Colocated weight update of {number(mib)} MiB of float32\n\n" + table(["", "time", "memcpy"], rows)
    return f"{text}\n\nMedians of the sender's own clocks: {', '.join(detail)}." if detail else text


def _circumstances(results: Results) -> str:
    lines = [f"* Machine: {', '.join(f'{name} {value}' for name, value in results.machine.items())}."]
    lines.append(f"* Versions: {', '.join(f'{name} {value}' for name, value in results.versions.items())}.")
    if results.size:
        lines.append(f"* {_described(Size.from_json(results.size))}")
    lines.append(f"* {results.rounds} rounds, sides in turn; medians (lowest..highest round).")
    lines += [f"* Not measured: {name}: {why}." for name, why in results.why_missing.items()]
    lines += [f"* {note}" for note in results.notes]
    lines += [f"* Failed: {failure}" for failure in results.failures]
    return "#### Circumstances\n\n" + "\n".join(lines)


def _described(size: Size) -> str:
    return (
        f"Model: {size.model}, float32. An iteration: {size.prompts} prompts, {size.group} answers each, of "
        f"{size.shortest} to {size.longest} tokens ({tokens_per_iteration(size):,} in all), {size.steps} optimizer "
        f"steps of {size.batch} samples. {size.iterations} iterations measured after {size.warm_up}. "
        f"Update: {size.update_model}, {size.updates} measured after one."
    )


def _with_range(found: Spread, text: Callable[[float], str]) -> str:
    if found.count < 2:
        return text(found.median)
    return f"{text(found.median)} ({text(found.low)}..{text(found.high)})"


def _seconds(found: Spread | None) -> str:
    return _NOTHING if found is None else _with_range(found, _span)


def _percents(found: Spread | None) -> str:
    return _NOTHING if found is None else _with_range(found, _percent)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(seconds: float) -> str:
    if abs(seconds) < 0.0995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s"
