"""A terminal as far as our console uses one: what a person sees after all that was written to it."""

from __future__ import annotations

import re
import unicodedata

_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Terminal:
    """Rows of cells, a cursor, lines that scroll out at the top. Long lines go on in the next row.

    ``resize`` breaks no line anew, as xterm; rows that are wider are cut.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.history: list[str] = []
        self._screen: list[str] = [""]
        self._row = self._column = 0

    def resize(self, columns: int, rows: int) -> None:
        """Another size."""
        self.columns, self.rows = columns, rows
        self._screen = [row[:columns] for row in self._screen]
        self._column = min(self._column, columns - 1)
        while len(self._screen) > rows:
            self.history.append(self._screen.pop(0))
            self._row -= 1

    def feed(self, text: str) -> None:
        """Something is written."""
        position = 0
        while position < len(text):
            match = _SEQUENCE.match(text, position)
            if match:
                self._order(match[1], match[2])
                position = match.end()
            else:
                self._character(text[position])
                position += 1

    def lines(self) -> list[str]:
        """All that can be read, from the oldest line on, without empty rows at the end."""
        shown = [*self.history, *self._screen]
        while shown and not shown[-1].strip():
            shown.pop()
        return [line.rstrip() for line in shown]

    def _order(self, number: str, letter: str) -> None:
        if letter == "A":
            self._row = max(0, self._row - int(number or 1))
        elif letter == "K":
            assert number == "2", "only whole lines are erased"
            self._screen[self._row] = ""
        elif number != "?25" or letter not in "hl":  # the cursor is hidden, and shown
            assert letter == "m", f"an order that this terminal does not know: {number}{letter}"

    def _character(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._column = 0
            self._down()
        else:
            assert unicodedata.category(character)[0] != "C", repr(character)
            if self._column == self.columns:
                self._column = 0
                self._down()
            row = self._screen[self._row].ljust(self._column)
            self._screen[self._row] = row[: self._column] + character + row[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._screen):
            self._screen.append("")
        if len(self._screen) > self.rows:
            self.history.append(self._screen.pop(0))
            self._row -= 1
