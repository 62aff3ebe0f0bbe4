"""The owner's handle of a mesh that this controller spawned, and the error that says that it is over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from miles_agents.errors import PeerFault
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.wire.codec_registry import register_as

if TYPE_CHECKING:
    from miles_controller.meshes import MeshSupervisor


class MeshFailed(PeerFault):
    """A mesh is over: its policy has no answer to a death, or its budget is spent."""

    code = "E-MESH-001"


class OwnedMesh(ActorMesh):
    """A handle that can also end its mesh and tell how it fares. Only the controller has it; copies that travel
    are plain handles. Its incarnations follow restarts."""

    _supervisor: MeshSupervisor

    async def stop(self, *, grace_s: float | None = None) -> None:
        """End all ranks: ``Actor.close`` on those that live, TERM, grace, KILL; returns when nothing runs any more.

        Raises:
            NotEnded: some ranks are not confirmed to have ended. The others have; the mesh keeps its name and the
                devices of those. It may be stopped again.
        """
        await self._supervisor.stop(grace_s=grace_s, close_actors=True)

    async def kill(self, *, rank: int | None = None) -> None:
        """Kill all ranks (which ends the mesh) or one (which is a death like any other, for the policy)."""
        if rank is None:
            await self._supervisor.stop(grace_s=0.0, close_actors=False)
        else:
            await self._supervisor.kill_rank(rank, "killed by its owner")

    async def wait_failed(self) -> MeshFailed | None:
        """Until the mesh has failed; returns why. None: it was stopped, or all its nodes were dismissed."""
        return await asyncio.shield(self._supervisor.failed)

    @property
    def failure(self) -> MeshFailed | None:
        """Why it failed, None while it has not."""
        failed = self._supervisor.failed
        return failed.result() if failed.done() and not failed.cancelled() else None

    async def stack(self, rank: int) -> str:
        """All stacks of a rank's process."""
        return await self._supervisor.stack(rank)

    async def log_tail(self, rank: int, num_lines: int = 50) -> list[str]:
        """The last lines of a rank's log."""
        return await self._supervisor.log_tail(rank, num_lines)


register_as(OwnedMesh, ActorMesh)
