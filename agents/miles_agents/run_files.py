"""The directory into which a run writes its events and logs, checked before anything depends on it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from miles_agents.errors import EnvironmentFault


class UnusableRunDirectory(EnvironmentFault):
    """A run cannot write its files where it was told to."""

    code = "E-DIR-004"

    @classmethod
    def because(cls, path: Path, error: OSError) -> UnusableRunDirectory:
        """For what the system said about a path."""
        try:
            where = f"working directory {Path.cwd()}"
        except OSError as gone:
            where = f"the working directory cannot be used: {gone}"
        return cls(
            f"{path} cannot be used for the files of a run",
            evidence=f"{error}; {where}; user {os.getuid()}",
            advice="Make it a directory that this user can write, with room on its disk, or choose another one.",
            path=str(path),
        )


def usable_directory(path: Path) -> Path:
    """The directory, absolute, made if need be; a file was written into it. Raises UnusableRunDirectory."""
    try:
        absolute = path.resolve()
        absolute.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=absolute) as file:
            file.write(b"\n")
    except OSError as error:
        raise UnusableRunDirectory.because(path, error) from None
    return absolute
