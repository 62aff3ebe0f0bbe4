"""``--sglang-*`` and ``--router-*``: every flag of the installed packages' own parsers, kept as JSON per version.

The first run after an installation reads SGLang's parser once (seconds, in a process of its own); later ones read
``$XDG_CACHE_HOME/miles/flags/``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from miles.flags.flag import Flag, refused
from miles.flags.problems import PassthroughUnreadable

Package = Literal["sglang", "router"]

_DISTRIBUTION: dict[Package, str] = {"sglang": "sglang", "router": "sglang-router"}
_FORMAT = 1
_READ_S = 240.0

_RUN_DECIDES = "it is decided by the run"
_OWN_KEY = "each run makes a key of its own, which no command line shows"
_EXCLUDED: dict[str, str] = {
    "model_path": "the model is --hf-checkpoint",
    "config": "give the flags themselves",
    "trust_remote_code": _RUN_DECIDES,
    "random_seed": "engine seeds are --seed plus the engine's number",
    "enable_memory_saver": "it follows --offload-rollout",
    "host": _RUN_DECIDES,
    "port": "ports are leased by the agent",
    "nccl_port": "ports are leased by the agent",
    "api_key": _OWN_KEY,
    "admin_api_key": _OWN_KEY,
    "router_api_key": _OWN_KEY,
    "nnodes": _RUN_DECIDES,
    "node_rank": _RUN_DECIDES,
    "dist_init_addr": _RUN_DECIDES,
    "gpu_id_step": _RUN_DECIDES,
    "base_gpu_id": _RUN_DECIDES,
    "device": "it is --device",
    "skip_server_warmup": _RUN_DECIDES,
    "enable_return_routed_experts": "it follows --use-rollout-routing-replay",
    "enable_return_indexer_topk": "it follows --use-rollout-indexer-replay, not built yet",
    "lora_paths": "engines get the trainer's adapter merged into their weights: --lora-rank",
    "worker_urls": "engines register themselves",
}


def sglang_flags() -> tuple[Flag, ...]:
    """With the ``--sglang-`` prefix; dests ``sglang_<field>``. Raises PassthroughUnreadable."""
    flags = []
    for row in _rows("sglang"):
        names = tuple(f"--sglang-{name.removeprefix('--')}" for name in row["names"] if name.startswith("--"))
        if names and row["dest"] != "help":
            flags.append(_flag(row, names, f"sglang_{row['dest']}", "sglang"))
    return tuple(flags)


def router_flags() -> tuple[Flag, ...]:
    """As ``sglang_router`` names them: ``--router-*``. Raises PassthroughUnreadable."""
    rows = [row for row in _rows("router") if any(name.startswith("--router-") for name in row["names"])]
    return tuple(_flag(row, tuple(row["names"]), row["dest"], "router") for row in rows)


def is_installed(package: Package) -> bool:
    """Whether SGLang, or sglang-router, is there. Nothing of it is imported."""
    try:
        importlib.metadata.version(_DISTRIBUTION[package])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _flag(row: dict[str, Any], names: tuple[str, ...], dest: str, source: Package) -> Flag:
    flag = Flag(
        names,
        dest,
        row["kind"],
        row["default"],
        row["help"],
        group=f"{source} (of the installed version)",
        choices=tuple(row["choices"]),
        nargs=row["nargs"],
        source=source,
    )
    reason = _EXCLUDED.get(row["dest"])
    return refused(flag, reason) if reason else flag


def _rows(package: Package) -> list[dict[str, Any]]:
    try:
        version = importlib.metadata.version(_DISTRIBUTION[package])
    except importlib.metadata.PackageNotFoundError as error:
        raise PassthroughUnreadable(
            f"flags beginning with --{package}- were given, and {_DISTRIBUTION[package]} is not installed",
            evidence=str(error),
            advice="Install it, or leave these flags out.",
        ) from None
    cached = cache_directory() / f"{package}-{version}-{_FORMAT}.json"
    try:
        rows = json.loads(cached.read_text())
        if isinstance(rows, list):
            return rows
    except (OSError, ValueError):
        pass
    text = _read(package)
    _keep(cached, text)
    return list(json.loads(text))


def cache_directory() -> Path:
    """Of the user: ``$XDG_CACHE_HOME/miles/flags``, or ``~/.cache/miles/flags``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles" / "flags"


def _keep(path: Path, text: str) -> None:
    """Written aside and renamed; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
            draft.write(text)
        os.replace(draft.name, path)
    except OSError:
        return


def _read(package: Package) -> str:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        _run([sys.executable, "-m", "miles.flags.read_parser", package, out.name], package)
        return Path(out.name).read_text()


def _run(command: Sequence[str], package: Package) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    if importlib.metadata.version("torch").endswith("+cpu") or not Path("/dev/nvidiactl").exists():
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        from miles.backends.sglang_utils.environment import stand_ins_first

        environment |= stand_ins_first(environment)
    else:
        environment = dict(os.environ)
    advice = f"Run it by hand to see more: {' '.join(command[1:-1])} /dev/stdout"
    what = f"the flags of the installed {_DISTRIBUTION[package]} cannot be read"
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_READ_S, env=environment)
    except subprocess.TimeoutExpired:
        raise PassthroughUnreadable(what, evidence=f"no answer in {_READ_S:.0f} s", advice=advice) from None
    if done.returncode:
        raise PassthroughUnreadable(what, evidence="\n".join(done.stderr.splitlines()[-20:]), advice=advice)
