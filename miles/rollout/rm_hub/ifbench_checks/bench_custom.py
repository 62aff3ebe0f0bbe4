"""IFBench: single tasks (``custom:``)."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

from miles.rollout.rm_hub.ifbench_checks.registry import instruction
from miles.rollout.rm_hub.ifbench_checks.word_lists import NORTHERN_CAPITALS
from miles.rollout.rm_hub.ifbench_checks.words import bare, plain_words, sentences

ifbench = partial(instruction, source="IFBench")
_QUESTION = re.compile(r"Question \d+[.):;]?")
_OPTION = re.compile(r"[A-Ea-e][.)|]\s*\w")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_NAPOLEON = (1769, 1821)


@ifbench("custom:multiples")
def multiples(text: str) -> bool:
    """The numbers in it are the multiples of 7 from 10 to 50, in order."""
    return re.findall(r"\d+", text) == [str(number) for number in range(14, 50, 7)]


@ifbench("custom:mcq_count_length")
def multiple_choice(text: str) -> bool:
    """Four questions headed Question and a number, nothing before, each longer than the last, with options A to E."""
    found = text.strip()
    if not _QUESTION.match(found):
        return False
    blocks = _QUESTION.split(found)[1:]
    asked = [list(_question(block)) for block in blocks]
    lengths = [len(" ".join(words)) for words, _ in (_halves(lines) for lines in asked)]
    counts = [sum(is_option for _, is_option in lines) for lines in asked]
    return counts == [5] * 4 and all(one < other for one, other in pairwise(lengths))


def _question(block: str) -> Iterator[tuple[str, bool]]:
    for line in map(str.strip, block.split("\n")):
        if line:
            yield line, _OPTION.match(line) is not None


def _halves(lines: list[tuple[str, bool]]) -> tuple[list[str], list[str]]:
    first = next((place for place, (_, is_option) in enumerate(lines) if is_option), len(lines))
    return [line for line, _ in lines[:first]], [line for line, _ in lines[first:]]


@ifbench("custom:reverse_newline")
def african_countries(text: str) -> bool:
    """From a line with Zimbabwe on, at least 52 lines against the order of the alphabet; accents do not count."""
    lines = [_plain(line) for line in map(bare_line, text.split("\n")) if line]
    start = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    listed = [line.lower() for line in lines[start:]]
    return len(listed) >= 52 and all(one >= other for one, other in pairwise(listed))


def bare_line(line: str) -> str:
    """A line without the punctuation and spaces around it."""
    return bare(line.strip()).strip()


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@ifbench("custom:word_reverse")
def words_reversed(text: str) -> bool:
    """One sentence with its words in reverse order, with the bald eagle in it."""
    return len(sentences(text)) == 1 and "bald eagle" in " ".join(reversed(plain_words(text)))


@ifbench("custom:character_reverse")
def letters_reversed(text: str) -> bool:
    """The bald eagle stands there with its letters in reverse order."""
    return "elgae dlab" in text.lower()


@ifbench("custom:sentence_alphabet")
def alphabetic_sentences(text: str) -> bool:
    """26 sentences; the first begins with a, the second with b, and so on."""
    return [bare(sentence)[:1].lower() for sentence in sentences(text)] == [chr(ord("a") + n) for n in range(26)]


@ifbench("custom:european_capitals_sort")
def capitals_by_latitude(text: str) -> bool:
    """Europe's capitals north of 45 degrees from north to south with commas between them; without Kyiv, too."""
    found = [name.strip() for name in _plain(text).split(",") if name.strip()]
    found = ["Kyiv" if name == "Kiev" else name for name in found]
    return found in (list(NORTHERN_CAPITALS), [name for name in NORTHERN_CAPITALS if name != "Kyiv"])


@ifbench("custom:csv_city")
def csv_cities(text: str) -> bool:
    """CSV with the columns ID, Country, City, Year, Count and seven rows."""
    rows = _rows(text, ",")
    return rows is not None and _has_shape(rows, ("ID", "Country", "City", "Year", "Count"), 7)


@ifbench("custom:csv_special_character")
def csv_products(text: str) -> bool:
    """CSV with ProductID, Category, Brand, Price, Stock and 14 rows, and a special character in a quoted field."""
    rows = _rows(text, ",")
    if rows is None or not _has_shape(rows, ("ProductID", "Category", "Brand", "Price", "Stock"), 14):
        return False
    quoted = (field[1:-1] for row in rows[1:] for field in row if _is_quoted(field))
    return any(not char.isalnum() and not char.isspace() and char != "_" for field in quoted for char in field)


@ifbench("custom:csv_quotes")
def csv_students(text: str) -> bool:
    """Rows with tabs: StudentID, Subject, Grade, Semester, Score and three more, each field in double quotes."""
    rows = _rows(text, "\t")
    if rows is None or not _has_shape(rows, ("StudentID", "Subject", "Grade", "Semester", "Score"), 3):
        return False
    return all(_is_quoted(field) for row in rows for field in row)


def _rows(text: str, delimiter: str) -> list[list[str]] | None:
    """Fields with their quotes; None: a quote is not closed. Delimiters and line ends in quotes belong to the field."""
    rows: list[list[str]] = []
    fields, start, is_open = [], 0, False
    found = text.strip("\r\n").replace("\r\n", "\n") + "\n"
    for place, char in enumerate(found):
        if char == '"':
            is_open = not is_open
        elif not is_open and char in (delimiter, "\n"):
            fields.append(found[start:place].strip())
            start = place + 1
            if char == "\n":
                rows.append(fields)
                fields = []
    return None if is_open else rows


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _has_shape(rows: list[list[str]], columns: tuple[str, ...], count: int) -> bool:
    names = tuple(field[1:-1] if _is_quoted(field) else field for field in rows[0])
    return names == columns and len(rows) == count + 1 and all(len(row) == len(columns) for row in rows)


@ifbench("custom:date_format_list")
def dates(text: str) -> bool:
    """Dates of Napoleon's lifetime as YYYY-MM-DD with commas between them, and nothing else."""
    return all(_is_date(part.strip()) for part in text.split(","))


def _is_date(text: str) -> bool:
    if not _DATE.fullmatch(text):
        return False
    try:
        found = datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return _NAPOLEON[0] <= found.year <= _NAPOLEON[1]
