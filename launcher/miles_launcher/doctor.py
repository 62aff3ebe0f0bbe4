"""``miles doctor [--json] [FLAGS of train.py]``: what is wrong with this machine, or with hosts that the flags name.

With flags that say only where (``--hosts``, ``--hostfile``, ``--launcher``, ...) hosts are compared with one another;
with all the flags of a run they are measured by what the run needs. Exit codes: 0 if it could start, 1 if something
would let it fail, 2 for flags that cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
from rich.console import Console
from rich.text import Text

from miles.flags.hosts import Host, HostProblem, parse_hostfile, parse_hosts
from miles.flags.slurm_facts import slurm_facts
from miles.training.exit_codes import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_OK
from miles_agents.errors import ConfigError, MilesError
from miles_agents.probe import Probe, code_hash
from miles_controller.config import forwarded_environment
from miles_launcher import ssh_nodes
from miles_launcher.launchers import agent_environment
from miles_launcher.own_address import bind_address
from miles_launcher.preflight.channel import Channel, ProcessChannel, Wrap
from miles_launcher.preflight.examine import Hub, examine
from miles_launcher.preflight.facts import Examined
from miles_launcher.preflight.findings import Finding, ordered
from miles_launcher.preflight.judge import judge
from miles_launcher.preflight.needs import Needs
from miles_launcher.preflight.table import report
from miles_launcher.slurm import found_allocation, srun
from miles_launcher.ssh_start import Machine, OwnCode, Ssh, python_of, remote_words, with_share

HERE = "this machine"
_WHERE = ("hosts", "hostfile", "launcher", "ssh_config", "remote_python", "controller_host", "interface", "device")


class BadDoctorFlag(ConfigError):
    """Flags of ``miles doctor`` that cannot work."""

    code = "E-DOCTOR-003"


def main(argv: Sequence[str]) -> int:
    """Look, and write what was found; returns the exit code."""
    arguments = [word for word in argv if word != "--json"]
    as_json = len(arguments) < len(argv)
    out, err = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if {"-h", "--help"} & set(arguments):
        _parser().print_help()
        return EXIT_OK
    try:
        config, needs = _asked(arguments, err)
        if config is None or needs is None:
            return EXIT_BAD_CONFIG
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            examined, findings = runner.run(look(config, needs))
    except MilesError as error:
        err.print(Text(str(error)))
        return EXIT_BAD_CONFIG
    if as_json:
        sys.stdout.write(json.dumps(as_plain(examined, findings), indent=1) + "\n")
    else:
        out.print(report(examined, findings))
    return EXIT_FAILED if any(finding.severity == "error" for finding in findings) else EXIT_OK


def as_plain(examined: Examined, findings: Sequence[Finding]) -> dict[str, Any]:
    """Of ``--json``: ``fit``, ``findings``, and all that was found out, by host and link."""
    return {
        "fit": all(finding.severity != "error" for finding in findings),
        "findings": [finding.as_dict() for finding in findings],
        "hosts": [asdict(host) for host in examined.hosts],
        "links": [asdict(link) for link in examined.links],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles doctor",
        allow_abbrev=False,
        description="Look at this machine, or at the hosts that the flags name, for what would let a run fail. "
        "Takes all flags of train.py: with those of a run, hosts are measured by what it needs.",
    )
    parser.add_argument("--json", action="store_true", help="print everything that was found out as JSON")
    parser.add_argument("--launcher", choices=("local", "ssh", "slurm", "external"))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    for name in _WHERE:
        if name not in ("launcher", "device"):
            parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help="as train.py has it")
    parser.add_argument("--run-dir", metavar="DIR", help="as train.py has it")
    return parser


def _asked(arguments: list[str], err: Console) -> tuple[Mapping[str, Any] | None, Needs | None]:
    """Where to look and by what to judge; None where problems with the flags of a run have been told."""
    options, further = _parser().parse_known_args(arguments)
    env = forwarded_environment()
    if further:
        from miles_launcher.train import resolve, told

        config = told(resolve(arguments), err, err)
        return config, None if config is None else Needs.of(config, {**env, **config["env"]})
    paths = {"run-dir": str(Path(options.run_dir or "runs").absolute())}
    device = "" if options.device == "auto" else options.device
    needs = Needs(device=device, paths=paths, written=("run-dir",), env=env, interface=options.interface)
    return _machines(options), needs


def _machines(options: argparse.Namespace) -> dict[str, Any]:
    """The part of a config that says where. Raises BadDoctorFlag."""
    problems: list[HostProblem] = []
    hosts: list[Host] = []
    launcher = options.launcher or ("ssh" if options.hosts or options.hostfile else None)
    _refuse_two_lists(options)
    if options.hosts:
        hosts, problems = parse_hosts(options.hosts)
    elif options.hostfile:
        try:
            hosts, problems = parse_hostfile(Path(options.hostfile).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems = [HostProblem(f"it cannot be read: {error}")]
    if problems:
        raise BadDoctorFlag(
            "the hosts cannot be understood",
            evidence="\n".join(map(str, problems[:10])),
            advice="Correct --hosts or --hostfile; docs/clusters.md has the formats.",
        )
    allocation = slurm_facts(os.environ)
    if launcher is None:
        launcher = "slurm" if allocation.nodes and allocation.nodes != (allocation.here,) else "local"
    if launcher == "ssh" and not hosts:
        raise BadDoctorFlag("--launcher ssh: no host is named", advice="Give --hosts or --hostfile.")
    names = [{"name": node, "host": node} for node in found_allocation(os.environ).nodes] if launcher == "slurm" else []
    where = {name: getattr(options, name) for name in _WHERE}
    return {**where, "launcher": launcher, "machines": names or [host.as_dict() for host in hosts], "sync_code": False}


def _refuse_two_lists(options: argparse.Namespace) -> None:
    """As ``miles.flags.rules_nodes`` has it for a run. Raises BadDoctorFlag."""
    if options.hosts and options.hostfile:
        raise BadDoctorFlag("--hostfile: --hosts names machines, too", advice="Give one of the two.")
    if options.launcher in ("local", "slurm") and (options.hosts or options.hostfile):
        whose = "this machine alone" if options.launcher == "local" else "the machines of the allocation"
        named = "hosts" if options.hosts else "hostfile"
        raise BadDoctorFlag(
            f"--{named}: --launcher {options.launcher} is {whose}",
            advice="Leave --launcher out, or give --launcher ssh.",
        )


async def look(config: Mapping[str, Any], needs: Needs) -> tuple[Examined, list[Finding]]:
    """Ask all hosts of a config (``launcher``, ``machines``, ...) and judge."""
    several = config["launcher"] in ("ssh", "slurm")
    if several and not config["sync_code"]:
        needs = replace(needs, code=code_hash())
    elsewhere: list[Finding] = []
    hub, listening = None, Probe()
    if several:
        try:
            address = urlsplit(_bind(config)).hostname or ""
            token = secrets.token_hex(8)
            hub = Hub(address, int(listening.listen(address, token)["port"]), token)
        except MilesError as error:
            elsewhere.append(Finding("error", "reach", (), error.what, error.evidence, error.advice))
    try:
        examined = await examine(
            _channels(config), needs, towards=hub.address if hub else "", hub=hub,
            path=OwnCode.read().path if several else (),
        )  # fmt: skip
    finally:
        listening.close()
    return examined, ordered([*elsewhere, *judge(examined, needs)])


def _bind(config: Mapping[str, Any]) -> str:
    if config["launcher"] == "ssh":
        machines = [Machine(**machine) for machine in config["machines"]]
        return ssh_nodes.bind_address(config["controller_host"], machines, Ssh(config["ssh_config"]))
    return bind_address(config["controller_host"], [machine["name"] for machine in config["machines"]])


def _channels(config: Mapping[str, Any]) -> list[Channel]:
    env = agent_environment(config) if "env" in config else {}
    if config["launcher"] == "ssh":
        machines = [Machine(**machine) for machine in config["machines"]]
        ssh, python = Ssh(config["ssh_config"]), config["remote_python"]
        if config["device"] != "cpu":
            machines = [with_share(machine, config.get("num_gpus_per_node")) for machine in machines]
        return [ProcessChannel(m.name, _by_ssh(ssh, m, python), {**env, **m.env}) for m in machines]
    if config["launcher"] == "slurm":
        allocation = found_allocation(os.environ)
        steps = {node: srun(allocation, node) for node in allocation.nodes}
        return [ProcessChannel(node, _after((*step, sys.executable)), env) for node, step in steps.items()]
    return [ProcessChannel(HERE, _after((sys.executable,)), env)]


def _after(words: Sequence[str]) -> Wrap:
    return lambda arguments: [*words, *arguments]


def _by_ssh(ssh: Ssh, machine: Machine, default: str | None) -> Wrap:
    def wrap(arguments: Sequence[str]) -> Sequence[str]:
        return ssh.command(machine, remote_words(python_of(machine, default), arguments))

    return wrap
