"""Tells when user code blocks its loop, and where: the stack goes to the log, the seconds into the progress."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

from miles.rollout.progress import Progress
from miles.utils.async_utils import LoopThread

logger = logging.getLogger(__name__)
WARN_S = 5.0


class Watchdog:
    """Asks the loop of user code for a sign of life, again and again, from a thread of its own.

    After ``warn_s`` without one it logs what the loop's thread is doing; again each time the silence has doubled.
    """

    def __init__(self, watched: LoopThread, progress: Progress, warn_s: float = WARN_S) -> None:
        self._watched = watched
        self._progress = progress
        self._warn_s = warn_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollout-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._end.wait(self._warn_s / 5):
            alive = threading.Event()
            try:
                self._watched.loop.call_soon_threadsafe(alive.set)
            except RuntimeError:
                return  # the loop is closed
            self._wait_for(alive)

    def _wait_for(self, alive: threading.Event) -> None:
        began, warn_at = time.monotonic(), self._warn_s
        while not alive.wait(self._warn_s / 5):
            blocked_s = time.monotonic() - began
            self._progress.blocked_s = blocked_s
            if blocked_s >= warn_at:
                warn_at *= 2
                logger.warning(
                    "user code blocks its event loop since %.0f s; other samples wait meanwhile. "
                    "Functions that take long should await, or be declared with def. It is here:\n%s",
                    blocked_s, self._stack(),
                )  # fmt: skip
            if self._end.is_set():
                return
        self._progress.blocked_s = 0.0

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched.thread.ident or 0)
        return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(the thread has ended)"
