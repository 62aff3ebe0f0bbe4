"""``--launcher``: the nodes of a run, and who starts their agents.

Each launcher is a function from the resolved config to ``Nodes``. It may raise a ``MilesError``; nothing has been
started then, and nothing is until ``Nodes.start`` is entered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from miles.training.job import Nodes
from miles.training.parts import preload, trainer_env
from miles_controller import Controller

NODE = "node-0"


def nodes_of(config: Mapping[str, Any]) -> Nodes:
    """Those of ``config["launcher"]``."""
    from miles_launcher.preflight.before_run import checked

    return checked(_LAUNCHERS[config["launcher"]](config), config)


def agent_environment(config: Mapping[str, Any]) -> dict[str, str]:
    """Variables of an agent beyond what its machine has: workers and services get them, too."""
    return {**config["env"], **trainer_env(config)}


def local_nodes(config: Mapping[str, Any]) -> Nodes:
    """This machine."""

    def start(controller: Controller, run_dir: Path) -> AbstractAsyncContextManager[Any]:
        from miles_launcher.local import LocalAgents

        return LocalAgents(
            controller,
            [NODE],
            run_dir=run_dir,
            cpu_slots=config["cpu_slots"] or None,
            preload=preload(config),
            env={**os.environ, **agent_environment(config)},
        )

    return Nodes((NODE,), start, join_s=config["start_timeout"])


def ssh_nodes(config: Mapping[str, Any]) -> Nodes:
    """The machines of ``--hosts`` or ``--hostfile``, by ssh."""
    from miles_launcher.ssh_nodes import nodes_by_ssh

    return nodes_by_ssh(config, agent_environment(config))


def slurm_nodes(config: Mapping[str, Any]) -> Nodes:
    """The nodes of the Slurm allocation that this process stands in, by srun."""
    from miles_launcher.slurm import nodes_by_slurm

    return nodes_by_slurm(config, agent_environment(config))


def external_nodes(config: Mapping[str, Any]) -> Nodes:
    """Nodes whose agents somebody else starts."""
    from miles_launcher.external import nodes_by_others

    return nodes_by_others(config)


_LAUNCHERS: dict[str, Callable[[Mapping[str, Any]], Nodes]] = {
    "local": local_nodes,
    "ssh": ssh_nodes,
    "slurm": slurm_nodes,
    "external": external_nodes,
}
