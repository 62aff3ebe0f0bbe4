"""A few lines at the bottom of a terminal that are drawn again and again, below everything that is printed.

Consumes: a function that gives the lines for a size of the terminal. Produces: control sequences around what the
console prints. Waits for: nothing (``TerminalWriter`` does); what the terminal takes late is drawn late. Invariants:
whatever is printed through the console, or through ``sys.stdout`` and ``sys.stderr``, stands above the lines, whole;
the cursor is never hidden, so that nothing has to be put right if the process is killed.

Taking lines away again relies on each having one row. Where the terminal has become narrower than they are, it may have
broken them or cut them, and nobody can tell which: then they are left where they are, and new ones begin below.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.segment import ControlType
from rich.text import Text

from miles.tracking.terminal_writer import TerminalWriter

FINISH_S = 5.0
"""At the end a terminal may take so long to take the rest."""


class LiveArea(RenderHook):
    """See the module's docstring. ``lines`` is given width and height in cells; it runs where something is printed."""

    def __init__(self, console: Console, lines: Callable[[int, int], list[Text]]) -> None:
        self._console = console
        self._lines = lines
        self._drawn: list[int] = []
        self._lock = threading.RLock()
        self._replaced: list[tuple[str, Any]] = []
        self._is_open = False
        self._file: IO[str] | None = None
        self._writer: TerminalWriter | None = None

    def open(self) -> None:
        """Draw from now on; what is written to stdout and stderr goes above."""
        self._is_open = True
        if _can_block(self._console.file):
            self._file, self._writer = self._console.file, TerminalWriter(cast("TextIO", self._console.file))
            self._console.file = cast("IO[str]", self._writer)
        self._console.push_render_hook(self)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._replaced.append((name, stream))
                setattr(sys, name, FileProxy(self._console, stream))
        self.refresh()

    def close(self) -> None:
        """Take the lines away. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        for name, stream in self._replaced:
            getattr(sys, name).flush()
            setattr(sys, name, stream)
        self._replaced.clear()
        with self._lock:
            self._console.pop_render_hook()
            self._console.print(self._taken_away(), end="")
            self._drawn = []
            if self._file is not None and self._writer is not None:
                self._writer.finish(FINISH_S)
                self._console.file, self._file = self._file, None

    def refresh(self) -> None:
        """Draw anew, if the terminal takes it now."""
        if self._is_open and self.can_write():
            self.print(Control())

    def print(self, *renderables: Any, **options: Any) -> None:
        """Print above the lines; from any thread."""
        with self._lock:
            self._console.print(*renderables, **options)

    def can_write(self) -> bool:
        """Whether the terminal has taken all that was printed: one that was stopped (Ctrl-S) has not."""
        return self._writer is None or self._writer.is_idle

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """For rich: what is printed, between taking the lines away and drawing them again."""
        if not self._is_open:
            return renderables
        with self._lock:
            before = self._taken_away()
            width, height = self._console.size
            lines = self._lines(width, max(1, height - 1))
            self._drawn = [line.cell_len for line in lines]
            block = Text("\n", end="").join(lines)
            block.end = ""
            block.no_wrap = True
            return [before, *renderables, block]

    def _taken_away(self) -> ConsoleRenderable:
        if not self._drawn:
            return Control()
        if max(self._drawn) > self._console.width:
            return Text("")
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * (len(self._drawn) - 1)
        return Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up)


def _can_block(file: IO[str]) -> bool:
    try:
        file.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
