"""A site directory as a compressed archive in parts, and back. Needs the standard library only."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, cast

MANIFEST = "manifest.json"
STAMP = ".bundle"  # in the installed directory: the digest of the archive it came from
CHUNK = 1 << 20
SOURCE_DATE = 315532800  # 1980-01-01: of every file, so that the same wheels make the same archive


class BundleBroken(Exception):
    """Parts are missing or are not those that were packed."""


def pack(site: Path, out: Path, part_bytes: int) -> list[Path]:
    """Write ``part1.bin`` ... of at most ``part_bytes`` and their manifest to ``out``, in place of earlier ones."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part*.bin"):
        old.unlink()
    archive = out / "site.tar.xz"
    compress(site, archive)
    parts = split(archive, out, part_bytes)
    listed = [{"name": part.name, "bytes": part.stat().st_size, "sha256": digest([part])} for part in parts]
    whole = digest([archive])
    (out / MANIFEST).write_text(json.dumps({"sha256": whole, "parts": listed}, indent=1) + "\n")
    archive.unlink()
    return parts


def compress(site: Path, archive: Path) -> None:
    """Alike files lie side by side in the archive, and nothing in it depends on when or by whom it was made."""
    files = sorted((path for path in site.rglob("*") if path.is_file()), key=lambda path: (path.suffix, str(path)))
    program = shutil.which("xz")
    with archive.open("wb") as sink:
        if program is None:
            with lzma.open(sink, "wb", preset=9) as stream:
                write_tar(stream, site, files)
            return
        # One block a core would be faster and larger; a dictionary of 64 MiB finds what files have in common.
        with subprocess.Popen([program, "-9", "-T1", "-c"], stdin=subprocess.PIPE, stdout=sink) as running:
            assert running.stdin is not None
            write_tar(running.stdin, site, files)
            running.stdin.close()
            if running.wait():
                raise BundleBroken(f"xz ended with {running.returncode}")


def write_tar(stream: IO[bytes], site: Path, files: Sequence[Path]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            entry = tarfile.TarInfo(file.relative_to(site).as_posix())
            entry.size, entry.mode, entry.mtime = file.stat().st_size, 0o644, SOURCE_DATE
            with file.open("rb") as source:
                tar.addfile(entry, source)


def split(archive: Path, out: Path, part_bytes: int) -> list[Path]:
    """Cut a file into ``out/part1.bin`` ... of at most ``part_bytes`` each."""
    parts: list[Path] = []
    with archive.open("rb") as source:
        while piece := source.read(part_bytes):
            parts.append(out / f"part{len(parts) + 1}.bin")
            parts[-1].write_bytes(piece)
    return parts


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    found = hashlib.sha256()
    for piece in pieces(files):
        found.update(piece)
    return found.hexdigest()


def pieces(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as source:
            while piece := source.read(CHUNK):
                yield piece


class Joined(RawIOBase):
    """The bytes of several files as one stream that is read once."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._pieces, self._left = pieces(files), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the start of ``buffer``; 0 at the end."""
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def checked_parts(directory: Path) -> tuple[str, list[Path]]:
    """The archive's digest and its parts in order. Raises BundleBroken if one lacks or differs."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        raise BundleBroken(f"{directory} has no {MANIFEST}: copy it there beside the parts") from None
    parts = [directory / entry["name"] for entry in manifest["parts"]]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise BundleBroken(f"{directory} lacks {', '.join(missing)}: copy all {len(parts)} parts there")
    wanted = {entry["name"]: entry["sha256"] for entry in manifest["parts"]}
    differ = [part.name for part in parts if digest([part]) != wanted[part.name]]
    if differ:
        raise BundleBroken(f"not what was packed: {', '.join(differ)} in {directory}; copy them again")
    return manifest["sha256"], parts


def install(directory: Path, target: Path) -> bool:
    """Unpack the parts in ``directory`` to ``target``, which is replaced. False: this very bundle is there already."""
    sha256, parts = checked_parts(directory)
    stamp = target / STAMP
    if stamp.exists() and stamp.read_text() == sha256:
        return False
    fresh = target.with_name(target.name + ".partial")
    for old in (fresh, target):
        shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir(parents=True)
    with lzma.open(cast("IO[bytes]", Joined(parts))) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(fresh, filter="data")
    (fresh / STAMP).write_text(sha256)
    fresh.rename(target)
    # Many processes import the same modules at the same time: compiled once, by all cores. Some files are templates
    # that no interpreter compiles.
    command = [sys.executable, "-W", "ignore", "-m", "compileall", "-qq", "-j", "0", str(target)]
    subprocess.run(command, check=False)
    return True


def exports(target: Path, repository: Path, more: Mapping[str, str]) -> str:
    """Lines for a POSIX shell: programs that run with these variables find the bundle and the project."""
    own = [repository / part for part in ("", "agents", "controller", "launcher")]
    paths = os.pathsep.join(str(path) for path in (target, *own))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in more.items()]
    return "\n".join([f"export PYTHONPATH={shlex.quote(paths)}${{PYTHONPATH:+:$PYTHONPATH}}", *lines])
