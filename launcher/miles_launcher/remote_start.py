"""What runs first on a host: checks that it can be used, then becomes ``miles agent``. Only the standard library.

It is sent whole over ssh's stdin (``LOADER`` reads it), so that nothing of ours has to be there before it has looked.

Consumes: the first line of stdin, JSON (``ssh_start.header`` makes it); with copied code a line ``go`` when that is
there; the key line is left to the agent. Produces: lines on stdout that begin with a mark of this start, then JSON:
``wants_code``, ``ready``, ``failed``; the agent, in this process. Waits for: ``go``, for as long as it is told at most;
the end of stdin ends it. Invariant: whatever it made is removed when it fails; after ``ready`` that is the reaper's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import shutil
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any, NoReturn

LOADER = (
    "import json,os;H=json.loads(os.fdopen(0,'rb',0,closefd=False).readline());"
    "exec(H.pop('code'),{'H':H,'__name__':'miles_remote_start'})"
)
"""For ``python -c``. Unbuffered: what follows the line is for others."""

REFUSED_CODE = 3
"""Exit code of a start that was refused, in the range of no shell and no agent."""
CODE_DIRECTORY = ".cache/miles/code"
RUN_DIRECTORY = ".cache/miles/runs"
_LEFT_S = 3600.0
"""Code that nobody holds is removed after so long: what is younger may be about to be used."""
_LOGS_S = 14 * 24 * 3600.0
"""Logs that stayed on a host are removed after so long, when another run starts there."""
_SUFFIXES = {".py", ".json"}


class Refused(Exception):
    """This host cannot be used. ``kind`` names the error that the launcher makes of it."""

    def __init__(self, kind: str, text: str, **facts: Any) -> None:
        super().__init__(text)
        self.kind = kind
        self.facts = facts


def digests(package: Path) -> dict[str, str]:
    """Of each file of a package that is code, by its path below the package's parent."""
    found = {}
    for folder, names, files in os.walk(package):
        names[:] = sorted(name for name in names if name != "__pycache__")
        for name in files:
            path = Path(folder) / name
            if path.suffix in _SUFFIXES:
                found[str(path.relative_to(package.parent))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fingerprint(files: dict[str, str]) -> str:
    """Of all of them."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def where_is(package: str) -> Path | None:
    """The directory of a package that would be imported."""
    spec = util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def versions(names: list[str]) -> dict[str, str]:
    """Of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Start:
    """One start on this host. ``head``: what was sent."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.head = head
        self.made: Path | None = None
        self.path: list[str] = []

    def say(self, kind: str, **facts: Any) -> None:
        """To the launcher. A banner without an end of line may stand before it."""
        line = f"\n{self.head['mark']} {json.dumps({'kind': kind, **facts})}\n"
        os.write(1, line.encode())

    def run(self) -> None:
        """Check and become the agent."""
        try:
            self._run()
        except Refused as refused:
            self._remove()
            self.say("failed", error=refused.kind, text=str(refused), **refused.facts)
            sys.exit(REFUSED_CODE)
        except BaseException:
            self._remove()
            raise

    def _run(self) -> None:
        head = self.head
        if list(sys.version_info[:2]) < head["python"]:
            wanted = ".".join(map(str, head["python"]))
            raise Refused("python", f"{sys.executable} is Python {sys.version.split()[0]}; {wanted} or newer is needed")
        cwd = head["cwd"]
        if head["copies_code"]:
            cwd = self._take_code()
        else:
            self.path = [entry for entry in head["path"] if os.path.isdir(entry)]
        sys.path[:0] = self.path
        self._check_modules()
        self._check_code()
        shared = [path for path, token in head["shared"].items() if self._shows(path, token)]
        self._become_agent(cwd, self._log_directory(shared), shared)

    # -- code ------------------------------------------------------------------------------------------------

    def _take_code(self) -> str:
        """A directory of this start, which the launcher fills; held for as long as anything of the run lives."""
        if shutil.which("rsync") is None:
            raise Refused("rsync", "there is no rsync on its PATH")
        base = Path.home() / CODE_DIRECTORY
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep(base, _LEFT_S)
            self.made = base / f"{self.head['run']}-{self.head['node']}-{os.getpid()}"
            for folder in (self.made, self.made / "lib", self.made / "cwd"):
                folder.mkdir(mode=0o700)
            self._hold(self.made)
        except OSError as error:
            raise Refused("directory", f"no directory for the code can be made: {error}") from None
        self.say("wants_code", directory=str(self.made))
        if self._line(self.head["copy_s"]) != b"go":
            raise Refused("copy", "the code did not come")
        self.path = [str(self.made / "lib"), str(self.made / "cwd")]
        return str(self.made / "cwd")

    def _hold(self, directory: Path) -> None:
        """Until this process and those that come of it have ended, nobody sweeps the directory."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.set_inheritable(fd, True)

    def _line(self, timeout_s: float) -> bytes:
        line, deadline = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return b""
            byte = os.read(0, 1)
            if not byte:
                return b""
            line += byte
        return line.strip()

    def _remove(self) -> None:
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)

    def _check_modules(self) -> None:
        missing = []
        for name in self.head["modules"]:
            try:
                found = util.find_spec(name)
            except ImportError:
                found = None
            if found is None:
                missing.append(name)
        if missing:
            where = ":".join(self.path) or "nothing"
            names = ", ".join(missing)
            raise Refused("modules", f"{sys.executable} does not find {names} (added to its path: {where})")

    def _check_code(self) -> None:
        files: dict[str, str] = {}
        places = {name: where_is(name) for name in self.head["packages"]}
        for place in places.values():
            files.update(digests(place) if place is not None else {})
        if fingerprint(files) != self.head["fingerprint"]:
            raise Refused("code", "its code is another", files=files, places={k: str(v) for k, v in places.items()})
        found, wanted = versions(list(self.head["versions"])), self.head["versions"]
        other = [
            f"{name} {found.get(name, 'is not installed')}, here {version}"
            for name, version in wanted.items()
            if name in found and _public(found[name]) != _public(version)
        ]
        if other:
            raise Refused("versions", "; ".join(other))

    # -- directories and the agent ---------------------------------------------------------------------------

    def _shows(self, path: str, token: str) -> bool:
        try:
            return bool((Path(path) / self.head["token_file"]).read_text() == token)
        except OSError:
            return False

    def _log_directory(self, shared: list[str]) -> str:
        run_dir = str(self.head["run_dir"])
        if run_dir in shared:
            return run_dir
        base = Path.home() / RUN_DIRECTORY
        own = base / self.head["run"] / self.head["node"]
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            sweep(base, _LOGS_S)
            own.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._hold(own.parent)
        except OSError as error:
            raise Refused("directory", f"no directory for logs can be made: {error}") from None
        return str(own)

    def _become_agent(self, cwd: str, log_dir: str, shared: list[str]) -> NoReturn:
        head = self.head
        env = {**os.environ, **head["env"]}
        env["MILES_NODE_PATH"] = os.pathsep.join(self.path)
        env["PYTHONPATH"] = os.pathsep.join([*self.path, *filter(None, [head["env"].get("PYTHONPATH")])])
        env["MILES_REAPER_SAYS"] = f"{head['mark']} {json.dumps({'kind': 'clean'})}"
        if self.made is not None:
            env["MILES_REAPER_REMOVES"] = str(self.made)
        try:
            os.chdir(cwd)
        except OSError:
            os.chdir(Path.home())
        argv = [sys.executable, "-m", "miles_launcher.cli", "agent", "--run-dir", log_dir, *head["flags"]]
        self.say("ready", reaper=os.getpid(), shared=shared, logs=log_dir, hostname=os.uname().nodename)
        os.execve(sys.executable, argv, env)  # noqa: S606  # no shell


def sweep(base: Path, age_s: float, now: float | None = None) -> None:
    """Remove the directories of runs that nobody holds and in which nothing changed for ``age_s``. ``now``: seconds
    since 1970, in place of the clock."""
    for name in os.listdir(base):
        path = base / name
        try:
            if (time.time() if now is None else now) - _changed(path) < age_s:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # somebody holds it
        finally:
            os.close(fd)


def _public(version: str) -> str:
    """Without what tells builds of one version apart (``+cpu``)."""
    return version.partition("+")[0]


def _changed(path: Path) -> float:
    """When anything in it changed last, in seconds since 1970."""
    below = (os.path.join(where, name) for where, names, files in os.walk(path) for name in [*names, *files])
    return max(os.lstat(one).st_ctime for one in [str(path), *below])


if __name__ == "miles_remote_start":
    Start(globals()["H"]).run()
