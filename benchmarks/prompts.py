"""Prompt files: how long a million rows take, and how much memory.

    python benchmarks/prompts.py [--rows 1000000] [--words 150]

For JSONL and Parquet: the look of the process that checks flags (until a broken line near the end, and over the whole
file), loading, an epoch's shuffling, and 1,024 samples of 128 prompts. Each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

BROKEN_SHARE = 0.987654


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=150, help="of each prompt")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(MEASURED[options.one[0]](options.one[1])))
        return 0
    shown = Table("what", "file", "seconds", "CPU seconds", "memory, MB")
    with tempfile.TemporaryDirectory() as directory:
        files = write_files(Path(directory), options.rows, options.words)
        for what, path in [("until the broken line", files["broken"])] + [
            (what, files[kind]) for kind in ("jsonl", "parquet") for what in ("look", "load", "1024 samples")
        ]:
            found = _in_a_process(what, path)
            size = f"{path.name}, {path.stat().st_size / 1e6:,.0f} MB"
            shown.add_row(what, size, f"{found['seconds']:.2f}", f"{found['cpu']:.2f}", f"{found['megabytes']:,.0f}")
    Console().print(shown)
    return 0


def write_files(directory: Path, rows: int, words: int) -> dict[str, Path]:
    """The same rows as JSONL and as Parquet, and as JSONL with a line that is cut off."""
    import orjson
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    files = {name: directory / f"{name}.{name.replace('broken', 'jsonl')}" for name in ("jsonl", "broken", "parquet")}
    batch: list[dict[str, object]] = []
    writer = None
    with files["jsonl"].open("wb") as good, files["broken"].open("wb") as broken:
        for i in range(rows):
            row = {"prompt": " ".join(draw.choices(known, k=words)), "label": str(i), "metadata": {"level": i % 5}}
            line = orjson.dumps(row) + b"\n"
            good.write(line)
            broken.write(line[:-20] + b"\n" if i + 1 == int(rows * BROKEN_SHARE) else line)
            batch.append(row)
            if len(batch) == 50_000 or i + 1 == rows:
                table = pa.Table.from_pylist(batch)
                writer = writer or pq.ParquetWriter(files["parquet"], table.schema)
                writer.write_table(table)
                batch.clear()
    if writer is not None:
        writer.close()
    return files


def _in_a_process(what: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", what, str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def _timed(run: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds, and by how much the most memory that was ever resident exceeds that of before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    run()
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "megabytes": _peak_mb() - before,
    }


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def look(path: str) -> dict[str, float]:
    """As the process does that checks flags."""
    from miles.flags.prompt_facts import read_data
    from miles.utils.prompt_columns import Columns

    return _timed(lambda: read_data(path, ["prompt", "label"], [Columns("prompt", "label", "metadata", "tools")]))


def load(path: str) -> dict[str, float]:
    """As the rollout manager does, without a limit of length."""
    from miles.utils.data import Dataset

    def run() -> None:
        Dataset(path, None, None, None, prompt_key="prompt", label_key="label").shuffle(0)

    return _timed(run)


def samples(path: str) -> dict[str, float]:
    """A rollout's prompts, in shuffled order."""
    from miles.utils.data import Dataset

    data = Dataset(path, None, None, None, prompt_key="prompt", label_key="label")
    data.shuffle(0)
    return _timed(lambda: [data.copies(i, 8) for i in range(min(128, len(data)))])


MEASURED = {"until the broken line": look, "look": look, "load": load, "1024 samples": samples}

if __name__ == "__main__":
    sys.exit(main())
