"""Starting on three hosts beside Ray, how soon a cut link is noticed, and a thousand hosts on virtual time.

    pip install -e '.[bench,dev]'    # as root, with iproute2 and openssh-server
    python benchmarks/launch.py --markdown docs/performance.md

Hosts are network namespaces of this machine, with an sshd in each. ``--ray-python`` names the interpreter of an
environment that has Ray, where this one has not. The exit code says whether everything could be measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from launch_bench import starts
from launch_bench.report import Results, insert, markdown
from launch_bench.simulated import simulate
from miles_agents.timings import Timings
from runtime_bench.circumstances import machine

NUM_HOSTS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    options = _parser().parse_args(argv)
    results = Results({"Machine": ", ".join(f"{key} {value}" for key, value in machine().items())}, options.rounds)
    if "starts" in options.only:
        _measure_starts(results, options.rounds, options.ray_python)
    if "reaction" in options.only:
        from launch_bench.reaction import react

        results.timings = Timings()
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="launch-") as folder:
                results.reactions.append(react(Path(folder) / "run", results.timings))
            _say(f"reaction {number + 1}/{options.rounds}: {results.reactions[-1]}")
    if "simulation" in options.only:
        results.simulated, starter = simulate(NUM_HOSTS)
        results.most_at_once = starter.most_at_work
    text = markdown(results)
    if options.markdown:
        options.markdown.write_text(insert(options.markdown.read_text(), text))
    print(text)
    return 1 if results.failures else 0


def _measure_starts(results: Results, rounds: int, ray_python: str | None) -> None:
    """In turn, round by round."""
    sides: dict[tuple[str, str], Callable[..., starts.Run]] = {
        ("runtime", "ours"): starts.ours(starts.TORCH),
        ("train", "ours"): starts.train,
    }
    if ray_python is None:
        results.why_no_ray = "Ray is not installed here, and --ray-python names no other environment"
    else:
        sides["runtime", "Ray"] = starts.ray(ray_python, starts.TORCH)
        sides["train", "Ray"] = starts.ray(ray_python, starts.TRAINER)
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for key in order:
            try:
                results.starts.setdefault(key, []).append(starts.measure(sides[key]))
                _say(f"round {number + 1}/{rounds}: {' '.join(key)}: {results.starts[key][-1]:.2f} s")
            except starts.NotMeasured as why:
                results.failures.append(f"{' '.join(key)}: {why}")
                _say(results.failures[-1])


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("starts", "reaction", "simulation")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of each (default 3)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure these alone")
    own = sys.executable if importlib.util.find_spec("ray") else None
    parser.add_argument("--ray-python", default=own, metavar="PYTHON", help="interpreter that has Ray")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between the file's markers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
