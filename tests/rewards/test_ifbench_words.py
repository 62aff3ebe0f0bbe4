"""Words and sentences, as the checks of instructions count them."""

import pytest

from miles.rollout.rm_hub.ifbench_checks.words import (
    bare,
    bare_words,
    count_words,
    ends_with_emoji,
    final_mark,
    plain_words,
    sentences,
    tokens,
    whole_words,
    word_tokens,
)

SENTENCES = [
    ("One. Two! Three?", ["One.", "Two!", "Three?"]),
    ("one. two", ["one.", "two"]),
    ("No mark at all\nover two lines", ["No mark at all\nover two lines"]),
    ("Dr. Smith met Mr. J. K. Rowling.", ["Dr. Smith met Mr. J. K. Rowling."]),
    ("He joined the U.S. Army. The end.", ["He joined the U.S. Army.", "The end."]),
    ("It is in the U.S. The end.", ["It is in the U.S.", "The end."]),
    ("At 5 p.m. We left.", ["At 5 p.m.", "We left."]),
    ("Cats, dogs etc. are here.", ["Cats, dogs etc. are here."]),
    ("See e.g. this. Or i.e. that.", ["See e.g. this.", "Or i.e. that."]),
    ("I said no. Then I left.", ["I said no.", "Then I left."]),
    ("See no. 5 and fig. 2. Done.", ["See no. 5 and fig. 2.", "Done."]),
    ("So do I. Then you.", ["So do I.", "Then you."]),
    ("Plan B. The next.", ["Plan B.", "The next."]),
    ("1. First item\n2. Second item", ["1. First item\n2. Second item"]),
    ("Pi is 3.14. Visit example.com. Yes", ["Pi is 3.14.", "Visit example.com.", "Yes"]),
    ("Wait... what? No... Really.", ["Wait... what?", "No...", "Really."]),
    ('He said "Go." Then left.', ['He said "Go."', "Then left."]),
    ('"Stop!" she cried.', ['"Stop!" she cried.']),
    ("(Really.) Yes. [So?] No", ["(Really.)", "Yes.", "[So?]", "No"]),
    ("**Bold.** Next _one._ End", ["**Bold.**", "Next _one._", "End"]),
    ("What?! No!! Yes", ["What?!", "No!!", "Yes"]),
    ("Hi! \U0001f600 Bye.\U0001f389 End \u2764\ufe0f", ["Hi! \U0001f600", "Bye.\U0001f389", "End \u2764\ufe0f"]),
    ("\u4e00\u3002\u4e8c\uff01\u4e09", ["\u4e00\u3002", "\u4e8c\uff01", "\u4e09"]),
    ("...", ["..."]),
    ("", []),
    (" \n ", []),
    ("a.b.c", ["a.b.c"]),
]
MARKS = [
    ("One.", "."), ("One?", "?"), ('"One!"', "!"), ("(One.)", "."), ("One. \U0001f600", "."), ("One", "e"),
    ("\u4e00\u3002", "."), ("What?!", "!"), ("", ""), ("**Bold.**", "."), ("\U0001f600", ""),
]  # fmt: skip
TOKENS = [
    ("Don't stop", ["Do", "n't", "stop"]),
    ("it\u2019s I'm we'll", ["it", "\u2019s", "I", "'m", "we", "'ll"]),
    ("well-known U.S. 3.14 1,000", ["well-known", "U.S", ".", "3.14", "1,000"]),
    ("a,b (c)... d", ["a", ",", "b", "(", "c", ")", "...", "d"]),
    ("O'Neil 'tis", ["O'Neil", "'", "tis"]),
    ("\u0939\u093f\u0928\u094d\u0926\u0940!", ["\u0939\u093f\u0928\u094d\u0926\u0940", "!"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "found"), SENTENCES)
def test_sentences(text, found):
    assert sentences(text) == found


@pytest.mark.parametrize(("sentence", "mark"), MARKS)
def test_final_mark(sentence, mark):
    assert final_mark(sentence) == mark


@pytest.mark.parametrize(("text", "found"), TOKENS)
def test_tokens(text, found):
    assert tokens(text) == found


def test_words():
    assert word_tokens("Oh, well... don't!") == ["Oh", "well", "do", "n't"]
    assert plain_words("Don't\u2014really, STOP: it's_ok (3.5)!") == ["dont", "really", "stop", "itsok", "35"]
    assert bare_words("\u201cHi!\u201d -- (don't) **so**") == ["Hi", "don't", "so"]
    assert [bare(word) for word in ("", "!!", "\u00bfa?", "x-y.")] == ["", "", "a", "x-y"]
    assert [count_words(text) for text in ("don't", "a-b c_d", "\u00e9t\u00e9 1", "!?", "")] == [2, 3, 2, 0, 0]
    assert [whole_words("a.b", text) for text in ("A.B, a.b", "a.bc", "xa.b acb", "")] == [2, 0, 0, 0]


def test_emojis_end_sentences():
    ends = ("Hi \U0001f600", "Hi \U0001f600.", "Hi \u2764\ufe0f!", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7 ")
    assert all(map(ends_with_emoji, ends))
    assert not any(map(ends_with_emoji, ("Hi", "Hi :)", "\U0001f600 hi", "", "\u4e2d", "1")))
