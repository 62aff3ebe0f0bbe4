"""Packages for GPU machines without network, so that ``benchmarks/gpu/run.py`` can run there.

Where there is a network: ``python benchmarks/gpu/bundle.py --out DIRECTORY`` writes ``part1.bin`` ... and
``manifest.json``. On the machine, whose own torch, triton and nvcc are used, with the repository and that directory:

    eval "$(python3 benchmarks/gpu/bundle.py --install DIRECTORY /opt/miles-site)"
    python3 benchmarks/gpu/run.py --out runs/gpu

For CPython 3.12 on x86_64 Linux with glibc 2.34. ``docs/gpu.md`` says more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_bench.bundle_contents import ARCHITECTURES, ENVIRONMENT, names_in, wheels
from gpu_bench.bundle_parts import BundleBroken, exports, install, pack
from gpu_bench.bundle_site import download, table_of, unpack, write_stand_ins

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIRECTORY", help="pack: where the parts go")
    what.add_argument(
        "--install", type=Path, nargs=2, metavar=("DIRECTORY", "TARGET"), help="unpack those parts, print exports"
    )
    parser.add_argument("--part-mib", type=int, default=50, help="of a part at most (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="CACHE", help="where wheels are kept and looked for first")
    parser.add_argument(
        "--there", type=Path, metavar="FILE", help="packages that the machine has, one a line (pip freeze)"
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sm90", help="GPUs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.install:
            return installed(*(path.resolve() for path in arguments.install))
        return packed(arguments)
    except (BundleBroken, subprocess.CalledProcessError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def packed(arguments: argparse.Namespace) -> int:
    there = names_in(arguments.there.read_text()) if arguments.there else set()
    with tempfile.TemporaryDirectory() as scratch:
        cache = arguments.wheels or Path(scratch, "wheels")
        site = Path(scratch, "site")
        files = download(wheels(there), cache)
        rows = [unpack(wheel, file, site, arguments.architecture) for wheel, file in files.items()]
        print(table_of(rows), flush=True)
        write_stand_ins(site)
        parts = pack(site, arguments.out, arguments.part_mib << 20)
    for part in parts:
        print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")
    return 0


def installed(directory: Path, target: Path) -> int:
    fresh = install(directory, target)
    print(f"{'unpacked to' if fresh else 'already in'} {target}", file=sys.stderr)
    print(exports(target, REPOSITORY, ENVIRONMENT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
