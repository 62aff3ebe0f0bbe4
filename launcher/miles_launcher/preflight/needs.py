"""What a run needs of its hosts. Pure: from its resolved config, or nothing in particular."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_RUNTIME = ("pyzmq", "msgpack", "psutil", "uvloop")
_TRAINER = {"megatron": ("torch", "megatron-core"), "fsdp": ("torch", "transformers")}
_ENGINES = ("torch", "sglang")
ASKED = (*_RUNTIME, "torch", "megatron-core", "sglang", "sglang-router", "transformers", "nvidia-ml-py", "numpy")
"""Packages whose versions are compared wherever they are."""

_PRESENT = ("hf_checkpoint", "ref_load", "prompt_data", "load")
_SHARED = ("save", "load")


@dataclass(frozen=True)
class Needs:
    """What the judge measures hosts by.

    Attributes:
        device: ``cuda``, ``cpu``, or empty: whatever there is.
        num_devices: GPUs of all hosts together; 0: any number.
        packages: Distributions that must be there.
        paths: Label to directory or file, to look at on each host.
        present: Labels of those that must exist.
        shared: Labels of those that must be one and the same on all hosts.
        written: Labels of those that the run writes to.
        ports: Of the first host, that must be free.
        env: Variables that all processes get, over those that a host has.
        interface: Network interface that agents are told to use.
        code: Hash of the code that every host has to have; empty: each other's.
    """

    device: str = ""
    num_devices: int = 0
    packages: tuple[str, ...] = _RUNTIME
    paths: Mapping[str, str] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    code: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], env: Mapping[str, str]) -> Needs:
        """Those of a run; ``env``: what its processes get beyond what a host has."""
        paths = {"run-dir": str(config["run_dir"])}
        for dest in (*_PRESENT, "save"):
            if isinstance(value := config.get(dest), str) and value:
                paths[dest.replace("_", "-")] = value.partition("@[")[0]  # a slice of prompts stands behind the file
        labels = {dest: dest.replace("_", "-") for dest in (*_PRESENT, *_SHARED)}
        # Resuming from nothing is a beginning: then --load names what --save will make.
        starts = config.get("load") == config.get("save")
        present = tuple(labels[d] for d in _PRESENT if labels[d] in paths and not (d == "load" and starts))
        port = None if config.get("sglang_router_ip") else config.get("sglang_router_port")
        return cls(
            device=str(config["device"]),
            num_devices=_num_gpus(config),
            packages=(*_RUNTIME, *_packages(config)),
            paths=paths,
            present=present,
            shared=tuple(labels[dest] for dest in _SHARED if labels[dest] in paths),
            written=tuple(label for label in ("run-dir", "save") if label in paths),
            ports=(int(port),) if port else (),
            env=env,
            interface=config.get("interface"),
        )


def _num_gpus(config: Mapping[str, Any]) -> int:
    if config["device"] != "cuda":
        return 0
    trainer = 0 if config["debug_rollout_only"] else int(config["world_size"])
    engines = 0 if config["debug_train_only"] or config.get("rollout_external") else int(config["rollout_num_gpus"])
    return max(trainer, engines) if config["colocate"] else trainer + engines


def _packages(config: Mapping[str, Any]) -> tuple[str, ...]:
    trainer = () if config["debug_rollout_only"] else _TRAINER[config["train_backend"]]
    engines = () if config["debug_train_only"] or config.get("rollout_external") else _ENGINES
    return tuple(dict.fromkeys((*trainer, *engines)))
