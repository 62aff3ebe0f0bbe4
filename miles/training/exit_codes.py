"""Exit codes of ``train.py``. Apart from what ends with them, because its light process needs them, too."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
"""The run failed."""
EXIT_BAD_CONFIG = 2
"""Flags or the user's files have to change."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_TERMINATED = 143
"""SIGTERM."""
