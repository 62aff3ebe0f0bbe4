"""What can end a call other than its answer. Each says whether the request may have run."""

from __future__ import annotations

from miles_agents.errors import ConfigError, PeerFault


class WorkerDied(PeerFault):
    """The process of the callee is gone. Fields: actor, node, pid, exit, may_have_run."""

    code = "E-PEER-001"


class NodeLost(PeerFault):
    """The callee's node is gone: its lease ended, or its agent was seen to exit. Fields: node, may_have_run."""

    code = "E-PEER-002"


class StaleHandle(PeerFault):
    """The handle names an earlier life of the actor. The request did not run."""

    code = "E-PEER-003"


class NoSuchActor(PeerFault):
    """Nobody knows the actor that was called. The request did not run."""

    code = "E-PEER-004"


class ControllerLost(PeerFault):
    """The link to the controller is over; this process fences itself."""

    code = "E-PEER-005"


class DeadlineExceeded(PeerFault, TimeoutError):
    """The call's deadline passed before the answer came. Field: may_have_run."""

    code = "E-CALL-001"


class CallCancelled(PeerFault):
    """The call was cancelled. Field: may_have_run (a running sync endpoint cannot be interrupted)."""

    code = "E-CALL-002"


class NotAnEndpoint(ConfigError, AttributeError):
    """The actor has no endpoint of that name."""

    code = "E-CALL-003"


class WindowFull(PeerFault):
    """So many calls wait for an answer that no more are taken."""

    code = "E-CALL-004"


class WouldDeadlock(ConfigError):
    """A blocking wait on the very thread that has to bring the answer."""

    code = "E-CALL-005"


class WrongVerb(ConfigError):
    """The verb does not fit the mesh or the endpoint."""

    code = "E-CALL-006"


class ActorFailedToStart(ConfigError):
    """The actor's class cannot be loaded in the worker."""

    code = "E-CALL-007"


class NotAnActorProcess(ConfigError):
    """A call was made where no runtime is: neither in a worker nor through a controller's own handle."""

    code = "E-CALL-008"
