"""``gpqa``: which option a response chose, and which one is right."""

# ruff: noqa: RUF001 - characters that look like others are what is tested
import time

import pytest

from miles.rollout.rm_hub.gpqa import DEFAULT_LETTERS, chosen_letter, compute_gpqa_reward

ABCD = tuple("ABCD")
LETTERS = [
    # response, letter among A to D
    ("The answer is B.", "B"),
    ("Answer: B", "B"),
    ("answer b", "B"),
    ("ANSWER IS C", "C"),
    ("The answer is: D", "D"),
    ("**Answer: B**", "B"),
    ("**Answer**: B", "B"),
    ("Answer: (B)", "B"),
    ("Answer: [C].", "C"),
    ("Answer: **C**", "C"),
    ("Answer: $\\boxed{C}$", "C"),
    ("The answer is $\\mathbf{D}$.", "D"),
    ("The answer is \\text{A}", "A"),
    ("option C", "C"),
    ("I choose option (c) here", "C"),
    ("choice is A", "A"),
    ("B is correct", "B"),
    ("B is the correct answer", "B"),
    ("(B) is correct", "B"),
    ("**D** is the correct option", "D"),
    ("Final answer: A", "A"),
    ("final option is D", "D"),
    ("The final answer is (A)", "A"),
    ("So it must be C", "C"),
    ("\\boxed{B}", "B"),
    ("\\boxed{\\text{B}}", "B"),
    ("A, B or C? C", "C"),
    ("C) because A and B are wrong, and D too", "D"),  # the last capital that stands alone
    ("Answer: B. The others, A, C and D, are wrong.", "B"),
    ("Option A is wrong. The answer is C", "A"),  # the first statement
    ("Answer: E", None),  # no valid letter
    ("The answer is E, I mean D", "D"),
    ("the answer is a matter of taste", None),  # an article
    ("the answer is a", "A"),
    ("the answer is a.", "A"),
    ("The answer choices are many", None),
    ("The answer is Because", None),
    ("answer: e.g. this", None),
    ("Bob and Carol", None),
    ("b c d", None),  # small letters alone are words
    ("DNA", None),
    ("A's", None),
    ("", None),
    ("Ответ: В", None),  # a Cyrillic letter
    ("答えはBです", None),
    ("答えは B です", "B"),
    ("The answer\n\nis\nB", "B"),
    ("answer" + " " * 7 + "B", "B"),
]


@pytest.mark.parametrize(("response", "letter"), LETTERS)
def test_letters(response, letter):
    assert chosen_letter(response, ABCD) == letter


M = {"choices": ["red", "green", "blue", "dark green"]}
CASES = [
    # response, label, metadata, reward
    ("Answer: B", "B", {}, 1.0),
    ("Answer: B", "b", {}, 1.0),
    ("Answer: B", " B ", {}, 1.0),
    ("Answer: B", "C", {}, 0.0),
    ("Answer: B</think>Answer: C", "C", {}, 1.0),
    ("Answer: C</think>Answer: B", "C", {}, 0.0),
    ("<think>Answer: C", "C", {}, 1.0),  # thoughts without an end are text
    ("Answer: H", "H", {}, 1.0),
    ("Answer: I", "H", {}, 0.0),
    ("Answer: B", 1, {}, 1.0),
    ("Answer: A", 0, {}, 1.0),
    ("Answer: B", 1, M, 1.0),
    ("Answer: B", "green", M, 1.0),
    ("Answer: B", "GREEN!", M, 1.0),
    ("Answer: D", "dark green", M, 1.0),
    ("Answer: D", "green", M, 0.0),
    ("Answer: E", "green", M, 0.0),  # four choices: there is no E
    ("it is green", "green", M, 1.0),
    ("it is Green.", "B", M, 1.0),
    ("it is red", "B", M, 0.0),
    ("it is dark green", "green", M, 1.0),  # the text occurs in it
    ("Answer: A", "C", M | {"correct_letter": "A"}, 1.0),  # the metadata's letter comes first
    ("Answer: A", "C", {"correct_letter": " a "}, 1.0),
    ("Answer: Z", "Z", {"valid_letters": ["X", "Y", "Z"]}, 1.0),
    ("Answer: z", "Z", {"valid_letters": "XYZ"}, 1.0),
    ("Answer: A", "A", {"valid_letters": ["X", "Y"]}, 1.0),  # no letter, but the label's text
    ("it is 42 km", None, {"correct_answer": "42 km"}, 1.0),
    ("it is 42 km", None, {"answer_text": "42 KM."}, 1.0),
    ("it is 42 km", None, {"correct_answer": "43 km"}, 0.0),
    ("it is 42", None, {"correct_answer": 42}, 1.0),
    ("it is 42", "42", {}, 1.0),
    ("it is 42", 42, {}, 1.0),  # no index of A to H: text
    ("Answer: B", None, {}, 0.0),
    ("Answer: B", None, None, 0.0),
    ("", "B", {}, 0.0),
    ("maybe", "B", {}, 0.0),  # a letter's text is no text
    (None, "B", {}, 0.0),
    ("x", "...", {}, 0.0),  # nothing is left of the label
    ("Answer: B", "B", {"choices": {"A": "red", "B": "green"}}, 1.0),
    ("it is green", "B", {"choices": {"A": "red", "B": "green"}}, 1.0),
    ("Answer: B", "B", {"choices": "red"}, 1.0),  # text is no list of choices
    ("Answer: B", True, {}, 0.0),
    ("it is β-decay", "β decay", {}, 1.0),
    ("日本です", "日本", {}, 1.0),
]


@pytest.mark.parametrize(("response", "label", "metadata", "reward"), CASES, ids=range(len(CASES)))
def test_answers(response, label, metadata, reward):
    assert compute_gpqa_reward(response, label, metadata) == reward


BOMBS = [
    "answer" + " " * 300_000, "A " * 150_000, "answer is " * 30_000, "*" * 300_000, "final answer" + "\n" * 300_000,
    "\\text{" * 50_000, "answer (((" * 30_000,
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_long_responses_take_no_longer_than_reading_them(bomb):
    began = time.monotonic()
    compute_gpqa_reward(bomb, "B", M)
    assert time.monotonic() - began < 2.0


def test_there_are_eight_letters_without_choices():
    assert "".join(DEFAULT_LETTERS) == "ABCDEFGH"
