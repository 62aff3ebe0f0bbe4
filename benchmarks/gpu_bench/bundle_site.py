"""Gets the wheels of a bundle and unpacks them into one site directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gpu_bench.bundle_contents import PYTHON, Wheel, is_stripped, stand_ins, why_left_out

# Those that a glibc of 2.34 and later loads (RHEL 9, Ubuntu 22.04): what sglang's own wheel asks for. pip takes each
# name as it stands.
PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 35)))


@dataclass(frozen=True)
class Unpacked:
    """What became of a wheel; sizes in bytes."""

    wheel: Wheel
    download: int
    whole: int
    kept: int


def download(wanted: Iterable[Wheel], cache: Path) -> dict[Wheel, Path]:
    """The wheels' files in ``cache``; pip gets those that are missing. Raises CalledProcessError."""
    cache.mkdir(parents=True, exist_ok=True)
    wanted = list(wanted)
    missing = [wheel.pin for wheel in wanted if find(wheel, cache) is None]
    if missing:
        targets = [f"--platform={name}_x86_64" for name in PLATFORMS]
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *targets]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", str(cache), *missing], check=True)
    found = {wheel: find(wheel, cache) for wheel in wanted}
    absent = [wheel.pin for wheel, path in found.items() if path is None]
    if absent:
        raise FileNotFoundError(f"pip put no wheel into {cache} of: {', '.join(absent)}")
    return {wheel: path for wheel, path in found.items() if path is not None}


def find(wheel: Wheel, cache: Path) -> Path | None:
    return next((path for path in sorted(cache.iterdir()) if wheel.is_file(path.name)), None)


def unpack(wheel: Wheel, file: Path, site: Path, architecture: str) -> Unpacked:
    """Put what is needed of a wheel into the site directory."""
    whole = kept = 0
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            whole += entry.file_size
            path = place(entry.filename)
            if path is None or entry.is_dir() or why_left_out(path, architecture):
                continue
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if is_stripped(path):
                strip(target)
            kept += target.stat().st_size
    return Unpacked(wheel, file.stat().st_size, whole, kept)


def place(path: str) -> str | None:
    """Where a wheel's file goes in the site directory; None: nowhere (programs, headers, absolute paths)."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/"):
        return None
    if parts[0].endswith(".data"):
        return "/".join(parts[2:]) if parts[1:2] in (("purelib",), ("platlib",)) else None
    return path


def strip(library: Path) -> None:
    """Take symbols for debuggers out of a library, where binutils are installed."""
    program = shutil.which("strip")
    if program:
        subprocess.run([program, "--strip-unneeded", str(library)], check=True)


def write_stand_ins(site: Path) -> None:
    for path, source in stand_ins().items():
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source)


def table_of(rows: Iterable[Unpacked]) -> str:
    """In MB: what was downloaded, what it unpacks to, what of that is packed. The largest come first."""
    rows = sorted(rows, key=lambda row: -row.kept)
    total = Unpacked(Wheel("in all", ""), *(sum(getattr(row, key) for row in rows) for key in SIZES))
    lines = [f"{'wheel':44} {'download':>9} {'unpacked':>9} {'packed':>9}"]
    for row in [*rows, total]:
        figures = " ".join(f"{getattr(row, key) / 1e6:9.1f}" for key in SIZES)
        lines.append(f"{row.wheel.name + ' ' + row.wheel.version:44} {figures}")
    return "\n".join(lines)


SIZES = ("download", "whole", "kept")
