"""The nodes of ``--hosts`` and ``--hostfile``: their settings from the config, and where the controller listens.

That is one address of this machine, the one that its way to the hosts begins at, never all of them.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from miles.training.job import Nodes
from miles.training.parts import preload
from miles_agents.agent.inventory import address_towards
from miles_controller import Controller
from miles_controller.config import forwarded_environment
from miles_launcher.agents import CannotStartAgent
from miles_launcher.local import agent_flags
from miles_launcher.ssh import SshAgents, SshSettings
from miles_launcher.ssh_errors import NoCommonAddress
from miles_launcher.ssh_start import Machine, Ssh

_LOOKED_AT = 16
"""Hosts that are looked at to find this machine's address: those of one cluster have one way from here."""
_RESOLVE_S = 20.0
JOIN_MARGIN_S = 10.0


def nodes_by_ssh(config: Mapping[str, Any], env: Mapping[str, str]) -> Nodes:
    """``env``: of everything that runs there. Raises NoCommonAddress, CannotStartAgent."""
    machines = [Machine(**machine) for machine in config["machines"]]
    settings = settings_of(config, env)

    def start(controller: Controller, run_dir: Path) -> AbstractAsyncContextManager[Any]:
        return SshAgents(controller, machines, run_dir, settings)

    bind = bind_address(config["controller_host"], machines, settings.ssh)
    return Nodes(tuple(machine.name for machine in machines), start, bind, join_s=JOIN_MARGIN_S)


def settings_of(config: Mapping[str, Any], env: Mapping[str, str]) -> SshSettings:
    """From the flags."""
    on_gpus = config["device"] != "cpu"
    return SshSettings(
        ssh=Ssh(config["ssh_config"]),
        python=config["remote_python"],
        copies_code=config["sync_code"],
        modules=needed_modules(config),
        must_share=shared_directories(config),
        env={**forwarded_environment(), **env},
        flags=tuple(further_flags(config)),
        slots=config["num_gpus_per_node"] if on_gpus else config["cpu_slots"] or None,
        on_gpus=on_gpus,
        at_once=config["hosts_at_once"],
        timeout_s=config["start_timeout"],
    )


def further_flags(config: Mapping[str, Any]) -> list[str]:
    """Of ``miles agent``, for all hosts, beyond those about the run."""
    return agent_flags(preload=preload(config), interface=config["interface"])


def needed_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a host that has any part of the run needs beyond what an agent needs."""
    modules = ["torch", "transformers"]
    if not config["debug_rollout_only"]:
        modules += ["megatron.core"] if config["train_backend"] == "megatron" else []
    if not config["debug_train_only"] and not config["rollout_external"]:
        modules += ["sglang", "sglang_router"]
    return tuple(modules)


def shared_directories(config: Mapping[str, Any]) -> dict[str, Path]:
    """What ranks on several hosts write together, or read what others wrote."""
    found = {flag: config[dest] for flag, dest in (("--save", "save"), ("--critic-save", "critic_save"))}
    if config["use_fault_tolerance"] or config["check_weight_update_equal"]:
        found["--run-dir"] = config["run_dir"]
    return {flag: Path(path) for flag, path in found.items() if path}


def bind_address(given: str | None, machines: Sequence[Machine], ssh: Ssh) -> str:
    """Where the controller listens: ``tcp://address:port``, port 0 for a free one.

    Raises:
        NoCommonAddress: ``given`` is no address of this machine; or none is given, and the ways to the hosts begin at
            several, or cannot be told.
    """
    if given is not None:
        return _own(given)
    ways = {machine.host: way_to(machine, ssh) for machine in machines[:_LOOKED_AT]}
    if (address := common_address(ways.values())) is not None:
        return _tcp(address, 0)
    raise NoCommonAddress(
        "it is not clear at which address the hosts reach this machine",
        evidence="; ".join(f"{host}: {way or 'no direct way (a name only ssh knows, or a proxy)'}" for host, way in
                           ways.items()),
        advice="Give --controller-host with an address of this machine that all hosts reach.",
    )  # fmt: skip


def common_address(ways: Iterable[str | None]) -> str | None:
    """The address of this machine that all hosts reach, given where the way to each begins, None: not known."""
    found = {way for way in ways if way is not None}
    # Who is reached over loopback is this machine, which reaches all of its addresses.
    outward = {address for address in found if not ipaddress.ip_address(address).is_loopback} or found
    return outward.pop() if len(outward) == 1 else None


def way_to(machine: Machine, ssh: Ssh) -> str | None:
    """This machine's address on the way to where ssh would connect; None if that is not direct, or not known."""
    command = ssh.resolved(machine)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RESOLVE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotStartAgent(
            "ssh cannot be run here", evidence=f"{' '.join(command)}: {error}", advice="Install OpenSSH's client."
        ) from None
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    if said.get("proxyjump", "none") != "none" or said.get("proxycommand", "none") != "none":
        return None
    host = said.get("hostname", machine.host)
    return address_towards(_tcp(host, int(said.get("port", "22"))))


def _own(given: str) -> str:
    host, _, port = given.rpartition(":") if given.count(":") == 1 or given.startswith("[") else (given, "", "")
    host = host.strip("[]") or given
    if port and not (port.isdecimal() and int(port) < 65536):
        raise _not_ours(given, f"{port!r} is no port")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, int(port or 0), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise _not_ours(given, str(error)) from None
    address = str(place[0])
    if ipaddress.ip_address(address).is_unspecified:
        raise _not_ours(given, "it stands for all addresses of this machine, and names none that hosts could dial")
    return _tcp(address, int(port or 0))


def _not_ours(given: str, why: str) -> NoCommonAddress:
    return NoCommonAddress(
        f"the controller cannot listen at {given}",
        evidence=why,
        advice="Give --controller-host with an address of this machine that all hosts reach.",
    )


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
