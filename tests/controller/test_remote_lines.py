"""Forwarded log lines: only what the node may say, and nothing that takes the console over."""

import pytest

from miles_controller.remote_lines import MAX_CHARS, MAX_LINES, clean, fit_lines


def entry(source="m[0]@node-0", text="hello", ranks=()):
    return [source, 1.0, text, list(ranks)]


def test_lines_of_the_node_are_shown_with_the_ranks_that_repeat_them():
    batch = [entry(), entry("m@node-0", "loss 1", [1, 2, 3, 7])]
    assert list(fit_lines("node-0", batch)) == ["m[0]@node-0 | hello", "m@node-0 | loss 1 (x4: ranks 1-3,7)"]


@pytest.mark.parametrize(
    "strange",
    [
        entry("m[0]@node-1"),
        entry("m[0]"),
        entry("m[0]@node-0\n"),
        entry("x\nm[0]@node-0"),
        entry("x" * 300 + "@node-0"),
        entry(7),
        entry(text=b"bytes"),
        entry(ranks=["1"]),
        entry(ranks=[True]),
        ["m[0]@node-0", 1.0, "short"],
        "a string",
        None,
    ],
)
def test_what_is_not_the_nodes_to_say_is_left_out(strange):
    assert list(fit_lines("node-0", [strange, entry()])) == [None, "m[0]@node-0 | hello"]
    assert list(fit_lines("node-0", strange))[:1] == [None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb", "a\tb"),
        ("red \x1b[31mtext\x1b[0m", "red text"),
        ("\x1b]0;title\x07x", "x"),
        ("fake\nmiles: all is well\r", "fakemiles: all is well"),
        ("\x9b2Jx\x00\x7f\u2028\u202ey", "2Jxy"),
        ("grüße 日本", "grüße 日本"),
    ],
)
def test_control_characters_are_taken_out_and_tabs_stay(text, shown):
    assert clean(text) == shown


def test_length_and_number_are_bounded():
    assert clean("x" * (MAX_CHARS + 5)) == "x" * MAX_CHARS + " [5 more characters]"
    assert clean("x" * MAX_CHARS) == "x" * MAX_CHARS
    lines = list(fit_lines("node-0", [entry()] * (MAX_LINES + 2)))
    assert lines.count(None) == 2
