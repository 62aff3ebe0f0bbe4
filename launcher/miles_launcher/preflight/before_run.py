"""The check of all nodes that every run makes once they have joined, by asking their agents."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from miles.training.job import Nodes
from miles_agents.errors import EnvironmentFault
from miles_agents.probe import code_hash
from miles_controller import Controller
from miles_controller.config import forwarded_environment
from miles_launcher.preflight.channel import AgentChannel
from miles_launcher.preflight.examine import examine
from miles_launcher.preflight.findings import Finding
from miles_launcher.preflight.judge import judge
from miles_launcher.preflight.needs import Needs

logger = logging.getLogger(__name__)


class NodesUnfit(EnvironmentFault):
    """What the nodes of a run are like would let it fail."""

    code = "E-DOCTOR-002"


def refuse_unfit(findings: list[Finding]) -> None:
    """Warn of what is suspicious. Raises NodesUnfit if anything is an error."""
    for finding in findings:
        if finding.severity == "warning":
            logger.warning("%s%s (%s)", _where(finding), finding.what, finding.evidence)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        lines = [f"{_where(each)}{each.what}\n  {each.evidence}\n  -> {each.advice}" for each in errors]
        raise NodesUnfit(
            f"the nodes are not fit for this run: {len(errors)} problem{'s' * (len(errors) != 1)}",
            evidence="\n".join(lines),
            advice="Repair these; `miles doctor` with the same flags looks again. --skip-preflight starts anyway.",
        )


def _where(finding: Finding) -> str:
    return f"{', '.join(finding.hosts)}: " if finding.hosts else ""


def checked(nodes: Nodes, config: Mapping[str, Any]) -> Nodes:
    """The same nodes, looked at once they have joined; ``--skip-preflight`` leaves them alone."""
    if config["skip_preflight"]:
        return nodes
    env = {**forwarded_environment(), **config["env"]}
    needs = Needs.of(config, env)
    if len(nodes.names) > 1 or config["launcher"] != "local":
        needs = replace(needs, code=code_hash())
    return replace(nodes, start=_checking(nodes, needs))


def _checking(nodes: Nodes, needs: Needs) -> Callable[..., AbstractAsyncContextManager[Any]]:
    @asynccontextmanager
    async def start(controller: Controller, run_dir: Any) -> AsyncIterator[Any]:
        async with nodes.start(controller, run_dir) as started:
            await controller.wait_for_nodes(timeout_s=nodes.join_s)
            channels = [AgentChannel(controller, name) for name in nodes.names]
            towards = urlsplit(controller.address).hostname or ""
            refuse_unfit(judge(await examine(channels, needs, towards=towards, quick=not needs.code), needs))
            yield started

    return start
