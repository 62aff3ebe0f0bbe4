"""Calls that block until others come, and cannot be ended. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LOOK_S = 0.002


class InThread:
    """What blocks until others come, so that somebody can look after it meanwhile."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._error = ""
        self._run = run
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._to_the_end, name=name, daemon=True)
        self._thread.start()

    def wait(self, is_hopeless: Callable[[], bool], within_s: float) -> str:
        """Until it is over. Returns why it came to nothing; empty: it went well."""
        deadline = time.monotonic() + within_s
        while not self._done.wait(_LOOK_S):
            if is_hopeless():
                return "somebody failed before all were there"
            if time.monotonic() > deadline:
                return f"not everybody came within {within_s:g} s"
        return self._error

    def let_end(self, within_s: float) -> None:
        """Wait a little: what it waited for has been ended."""
        self._thread.join(within_s)

    def _to_the_end(self) -> None:
        run = self._run
        del self._run  # it may keep the backend, and so its connections
        try:
            run()
        except Exception as error:  # noqa: BLE001  # whoever waits has to hear of it
            self._error = str(error) or type(error).__name__
        finally:
            del run
            self._done.set()
