"""What goes wrong in the FSDP backend, by whose move it is."""

from __future__ import annotations

from miles_agents.errors import ConfigError


class FsdpFlagRefused(ConfigError):
    """A flag asks for what this backend, or this device, does not do."""

    code = "E-FSDP-001"


class BadModelDirectory(ConfigError):
    """A Hugging Face directory does not hold the model that its ``config.json`` describes."""

    code = "E-FSDP-002"


class BadFsdpCheckpoint(ConfigError):
    """A checkpoint of this backend is not there, not whole, or of another model."""

    code = "E-FSDP-003"


class NotFinite(ConfigError):
    """A loss or a gradient is NaN or infinite, and ``--no-check-for-nan-in-loss-and-grad`` was not given."""

    code = "E-FSDP-004"
