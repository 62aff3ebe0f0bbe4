"""The meshes of a controller: where they are placed, how they are spawned, found and forgotten.

Consumes: spawns of the owner, ends of meshes. Produces: supervisors, placements, the inventory. Waits for: a mesh to
start, bounded by its own deadlines. Invariants: a name and a number belong to one living mesh at a time, and a number
is never used again; a device is counted as used for as long as a living mesh has a rank on it, a spare node for as long
as a mesh of its placement lives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from miles_agents.node_info import NodeInfo
from miles_agents.rpc.errors import NoSuchActor
from miles_agents.rpc.mesh import ActorMesh
from miles_agents.rpc.shape import Shape
from miles_agents.wire.envelope import FIRST_USER_MESH
from miles_controller.gangs import Gang, Gangs, check_placement
from miles_controller.meshes import MeshSupervisor, SpawnPlan
from miles_controller.owned_mesh import OwnedMesh
from miles_controller.placement import Inventory, Placement, Request, Slot, place
from miles_controller.policy import Policy
from miles_controller.services import NameTaken

if TYPE_CHECKING:
    from miles_controller.controller import Controller


class MeshKeeper:
    """See the module's docstring."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._by_name: dict[str, MeshSupervisor] = {}
        self._by_id: dict[int, MeshSupervisor] = {}
        self._gangs = Gangs()
        self._gang_of: dict[str, Gang] = {}
        self._num_meshes = 0

    @property
    def living(self) -> list[MeshSupervisor]:
        """All that have not ended, also those that are being started."""
        return list(self._by_name.values())

    def supervisor_of(self, mesh: int) -> MeshSupervisor | None:
        """The living mesh of that number."""
        return self._by_id.get(mesh)

    def find(self, name: str) -> OwnedMesh | None:
        """The living mesh of that name; None also while it is being started."""
        supervisor = self._by_name.get(name)
        return supervisor.handle if supervisor is not None and supervisor.has_started else None

    async def lookup(self, name: str) -> ActorMesh:
        """An endpoint: the handle of a mesh, for whoever asks."""
        supervisor = self._by_name.get(name)
        if supervisor is None or not supervisor.has_started:
            started = [mesh.name for mesh in self._by_name.values() if mesh.has_started]
            raise NoSuchActor(
                f"there is no mesh {name!r}" if supervisor is None else f"mesh {name!r} is still being started",
                evidence=f"meshes: {', '.join(started) or 'none'}",
                advice="Spawn it first, or check the name.",
                may_have_run=False,
            )
        return ActorMesh(supervisor.info, supervisor.shape)

    # -- placing ---------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What there is, and what is used by whom, now."""
        return self._gangs.inventory(self._infos())

    def _infos(self) -> list[NodeInfo]:
        return [node.info for node in self._controller.fabric.nodes]

    def place(self, requests: Sequence[Request], *, num_spares: int = 0) -> Placement:
        """Place gangs together on what is free now."""
        return place(self.inventory(), requests, num_spares=num_spares)

    def _placed(
        self, name: str, dims: Mapping[str, int], placement: Placement | None, devices: int, *, oversubscribe: bool
    ) -> Placement:
        """The caller's placement, if it can be used, or one of its own."""
        num_ranks = math.prod(dims.values())
        if placement is None:
            per_node = num_ranks // dims["hosts"] if next(iter(dims)) == "hosts" else None
            request = Request(name, num_ranks, devices, ranks_per_node=per_node, oversubscribe=oversubscribe)
            return self.place([request])
        gang = self._gangs.find(placement)
        current = placement if gang is None or name not in gang.current.slots else gang.current
        inventory = self._gangs.inventory(self._infos(), without=gang, keeps=False)
        check_placement(current, name, num_ranks, inventory, reserves_spares=gang is None)
        return placement

    def slot_of(self, name: str, rank: int) -> Slot:
        """Where a rank is to run now. If its node is lost, all ranks that were placed there together move together.

        Raises:
            InfeasiblePlacement: nothing fits.
        """
        gang, fabric = self._gang_of[name], self._controller.fabric
        lost = gang.current.slots[name][rank][0].node
        if fabric.find(lost) is None:
            known = fabric.membership.members[lost].info
            self._gangs.move(gang, lost, known.device_kind if known is not None else None, self._infos())
            now = gang.current.slots[name][rank][0].node
            self._controller.events.emit("ranks_moved", lost, f"what {'+'.join(gang.living)} had there goes to {now}")
        return gang.current.slots[name][rank][0]

    # -- from spawn to end -----------------------------------------------------------------------------------

    async def spawn(
        self, name: str, plan: SpawnPlan, policy: Policy, *, dims: Mapping[str, int] | None,
        placement: Placement | None, devices_per_rank: int, oversubscribe: bool,
    ) -> OwnedMesh:  # fmt: skip
        """Start a mesh and wait until all of it is constructed; see ``Controller.spawn``."""
        self.refuse_taken(name)
        shape = Shape.of(**(dims or {"ranks": 1}))
        sizes = dims or {"ranks": 1}
        placement = self._placed(name, sizes, placement, devices_per_rank, oversubscribe=oversubscribe)
        self._gang_of[name] = gang = self._gangs.join(placement, name)
        slots = [parts[0] for parts in gang.current.slots[name]]
        mesh = FIRST_USER_MESH + self._num_meshes
        self._num_meshes += 1
        supervisor = MeshSupervisor(self._controller, mesh, name, shape=shape, slots=slots, plan=plan, policy=policy)
        self._by_name[name] = self._by_id[mesh] = supervisor
        await supervisor.start()
        self._controller.events.emit("mesh_started", name, f"{len(shape)} ranks ({shape.extent})")
        return supervisor.handle

    def refuse_taken(self, name: str) -> None:
        """Raises NameTaken if a living mesh is called so."""
        if name in self._by_name:
            raise NameTaken(
                f"there is a mesh {name!r} already",
                evidence=f"meshes: {', '.join(self._by_name)}",
                advice="Stop it first, or choose another name.",
            )

    def left(self, supervisor: MeshSupervisor) -> None:
        """A mesh has ended; its name is free."""
        if self._by_name.get(supervisor.name) is supervisor:
            del self._by_name[supervisor.name]
            self._gangs.leave(self._gang_of.pop(supervisor.name), supervisor.name)
        self._by_id.pop(supervisor.mesh, None)
