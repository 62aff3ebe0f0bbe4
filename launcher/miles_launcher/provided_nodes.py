"""The nodes of an embedded job, from its provider's to its release.

Consumes: a provider, a controller that listens, the verdicts of both sides on nodes. Produces: agents that join.
Waits for: the provider's nodes, as long as it takes; everything else with a deadline. Invariants: of each node that
the provider gave, ``stop`` is called, and then exactly one of ``release`` and ``lost``; also if something raises, and
if the job is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path

from miles_agents.errors import ConfigError, InternalError, MilesError
from miles_controller import Controller
from miles_controller.events import Event
from miles_launcher.node_provider import Invitation, Node, NodeNeed, NodeProvider

logger = logging.getLogger(__name__)
START_S = 60.0
STOP_S = 60.0
TELL_S = 30.0


class BadNodes(ConfigError):
    """A node provider gave nodes that cannot be used: none at all, or two of one name."""

    code = "E-PROV-001"


class NodeNotStarted(InternalError):
    """A node of a provider could not start its agent, for a reason that is not one of ours."""

    code = "E-PROV-002"


class NotItsNode(ConfigError):
    """A node was named that is not the job's."""

    code = "E-PROV-003"


class ProvidedNodes:
    """Async context manager; see the module's docstring.

    Args:
        preload, env: For the agents (``Invitation``).
    """

    def __init__(
        self,
        provider: NodeProvider,
        need: NodeNeed,
        controller: Controller,
        run_dir: Path,
        *,
        preload: tuple[str, ...] | None,
        env: Mapping[str, str],
    ) -> None:
        self._provider = provider
        self._need = need
        self._controller = controller
        self._run_dir = run_dir
        self._preload = preload
        self._env = dict(env)
        self._nodes: dict[str, Node] = {}
        self._dismissed = controller.fabric.dismissed
        self._telling: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ProvidedNodes:
        given = list(await self._provider.request(self._need))
        self._nodes = {node.name: node for node in given}
        self._controller.events.listen(self._on_event)
        try:
            _check(given)
            await _all(*(self._start(node) for node in given))
        except BadNodes:
            await asyncio.gather(*(self._end(node) for node in given))
            raise
        except BaseException:
            await asyncio.shield(self._end_all(given, "the job did not begin"))
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        nodes = list(self._nodes.values())
        why = "the job is done" if kind is None else f"the job has ended: {kind.__name__}"
        errors = await self._end_all(nodes, why)
        if errors and kind is None:
            raise errors[0]

    async def leave(self, name: str, why: str) -> None:
        """Send a node away that does nothing for the job. Raises NotItsNode."""
        await self._end_all([self.node(name)], why)

    def node(self, name: str) -> Node:
        """The job's node of that name. Raises NotItsNode."""
        if name not in self._nodes:
            raise NotItsNode(
                f"the job has no node {name!r}",
                evidence=f"its nodes: {', '.join(self._nodes) or 'none'}",
                advice="Name one that the job was given and has not given back.",
            )
        return self._nodes[name]

    def is_idle(self, name: str) -> bool:
        """Whether no rank and no service of the job is on that node."""
        used = {rank.slot.node for mesh in self._controller.meshes.living for rank in mesh.ranks}
        return name not in used | {service["node"] for service in self._controller.services.snapshot()}

    async def _start(self, node: Node) -> None:
        controller, name = self._controller, node.name

        def report_exit(evidence: str, reaper: int) -> None:
            controller.report_node_exit(name, evidence, reaper=reaper)

        invitation = Invitation(
            name, controller.run_id, controller.address, controller.local_address, controller.issue_key(name),
            self._run_dir, self._preload, self._env, report_exit,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                await node.start(invitation)
        except MilesError:
            raise
        except Exception as error:  # boundary: the embedder's
            raise NodeNotStarted(
                f"node {name} could not start its agent",
                evidence=f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__} in {START_S} s",
                advice="Correct the provider's Node.start; its traceback is the cause of this error.",
            ) from error

    def _on_event(self, event: Event) -> None:
        # An agent that left by itself, as by its scheduler's SIGTERM, has left nothing; but the node is gone, too.
        is_lost = event.kind == "node_dead" or (event.kind == "node_gone" and event.subject not in self._dismissed)
        if is_lost and event.subject in self._nodes:
            node = self._nodes.pop(event.subject)
            task = asyncio.get_running_loop().create_task(self._lose(node, event.text))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _lose(self, node: Node, why: str) -> None:
        await self._told(node.stop(), STOP_S, f"stopping {node.name}")
        await self._told(self._provider.lost(node, why), TELL_S, f"telling that {node.name} is lost")

    async def _end_all(self, nodes: Sequence[Node], why: str) -> list[MilesError]:
        """Goodbye, stop, release; what the embedder's code raises is logged, and keeps nothing else. Returns what
        ``stop`` raised of ours."""
        names = [node.name for node in nodes if node.name in self._nodes]
        errors: list[MilesError] = []
        try:
            await self._controller.dismiss(*names, reason=why)
        finally:
            # A node that died meanwhile was taken out, and is told as lost.
            going = [self._nodes.pop(name) for name in names if name in self._nodes]
            for found in await asyncio.gather(*(self._end(node) for node in going)):
                errors += found
            if self._telling:
                await asyncio.wait(self._telling)
        return errors

    async def _end(self, node: Node) -> list[MilesError]:
        error = await self._told(node.stop(), STOP_S, f"stopping {node.name}")
        await self._told(self._provider.release(node), TELL_S, f"releasing {node.name}")
        return [error] if error is not None else []

    async def _told(self, call: Awaitable[None], timeout_s: float, what: str) -> MilesError | None:
        """Call the embedder's code, bounded. Returns what it raised of ours; everything is an event."""
        try:
            async with asyncio.timeout(timeout_s):
                await call
        except Exception as error:  # boundary: the embedder's
            logger.exception("%s failed", what)
            text = f"{what} failed: {type(error).__name__}: {error}".splitlines()[0]
            self._controller.events.emit("node_provider_failed", what.rpartition(" ")[2], text)
            return error if isinstance(error, MilesError) else None
        return None


def _check(nodes: Sequence[Node]) -> None:
    names = [node.name for node in nodes]
    if not names or len(set(names)) < len(names):
        raise BadNodes(
            "the node provider gave two nodes of one name" if names else "the node provider gave no node",
            evidence=f"nodes: {', '.join(names) or 'none'}",
            advice="Return at least one node from request, each with a name of its own.",
        )


async def _all(*calls: Awaitable[None]) -> None:
    """All at once; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(_awaited(call))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _awaited(call: Awaitable[None]) -> None:
    await call
