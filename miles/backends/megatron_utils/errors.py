"""Errors of the Megatron backend and of its checkpoints."""

from __future__ import annotations

from miles_agents.errors import ConfigError, EnvironmentFault, UserCodeError


class UnsupportedModel(ConfigError):
    """A model whose architecture the backend does not know."""

    code = "E-MEG-001"


class BadModelDirectory(ConfigError):
    """A Hugging Face directory that is missing, incomplete, or does not hold the model that its config describes."""

    code = "E-MEG-002"


class UnsupportedParallelism(ConfigError):
    """A kind of parallelism, or a size of it, that the backend or the model cannot do."""

    code = "E-MEG-003"


class UnsupportedSetting(ConfigError):
    """A Megatron flag that the backend or this device cannot honour."""

    code = "E-MEG-004"


class NonFiniteGradients(UserCodeError):
    """The gradients of a step hold NaN or infinity."""

    code = "E-MEG-005"


class CheckpointMismatch(ConfigError):
    """A checkpoint of another model, or without what was asked for."""

    code = "E-CKPT-003"


class CannotWriteCheckpoint(EnvironmentFault):
    """A checkpoint or export could not be written: a full disk, a missing permission."""

    code = "E-CKPT-004"


class DestinationExists(ConfigError):
    """Where something is to be written there is something already."""

    code = "E-CKPT-005"
