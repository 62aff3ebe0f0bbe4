r"""``dapo``: the last ``Answer:`` of the last 300 characters, as text after Minerva's normalisation."""

# ruff: noqa: RUF001 - characters that look like others are what is tested
import pytest

from miles.rollout.rm_hub.math_dapo_utils import compute_score, is_correct_strict_box, normalize_final_answer

GOOD, BAD = 1.0, -1.0
CASES = [
    # response, label, score, pred
    ("Answer: 34", "34", GOOD, "34"),
    ("Answer: 35", "34", BAD, "35"),
    ("answer:34", "34", GOOD, "34"),
    ("ANSWER :  34", "34", GOOD, "34"),
    ("Answer:\n34", "34", GOOD, "34"),  # the space after the colon may be a new line
    ("Answer: 34\nso it is", "34", GOOD, "34"),
    ("Answer: 1\nAnswer: 34", "34", GOOD, "34"),
    ("Answer: 34\nAnswer: 1", "34", BAD, "1"),
    ("The answer is 34", "34", BAD, "[INVALID]"),
    ("", "34", BAD, "[INVALID]"),
    ("Answer:", "34", BAD, "[INVALID]"),
    ("Answer: " + " " * 400 + "34", "34", BAD, "[INVALID]"),  # not among the last 300 characters
    ("Answer: 34" + "." * 291, "34", BAD, "[INVALID]"),
    ("Answer: 34" + " " * 290, "34", GOOD, "34"),
    ("x" * 1_000_000 + "Answer: 34", "34", GOOD, "34"),
    ("Answer: 34\r\nso it is", "34", GOOD, "34"),
    ("Answer: 34\t", "34", GOOD, "34"),
    ("Answer: $34$", "34", GOOD, "34"),
    ("Answer: \\$34", "34", GOOD, "34"),
    ("Answer: \\boxed{34}", "34", GOOD, "34"),
    ("Answer: $\\boxed{34}$.", "34", GOOD, "34"),
    ("Answer: \\text{34}", "34", GOOD, "34"),
    ("Answer: \\textbf{34}", "34", GOOD, "34"),
    ("Answer: **34**", "34", BAD, "**34**"),
    ("Answer: x = 34", "34", GOOD, "34"),
    ("Answer: 34 = x", "34", BAD, "x"),
    ("Answer: 1,234", "1234", GOOD, "1234"),
    ("Answer: 1{,}234", "1234", GOOD, "1234"),
    ("Answer: 1,\\!234", "1234", GOOD, "1234"),
    ("Answer: 34 degrees", "34", GOOD, "34"),
    ("Answer: 34^\\circ", "34", GOOD, "34"),
    ("Answer: 34 cm", "34", GOOD, "34"),
    ("Answer: 34 \\text{ m}", "34", GOOD, "34"),
    ("Answer: 34.", "34", BAD, "34."),
    ("Answer: 34.0", "34", BAD, "34.0"),
    ("Answer: 034", "34", BAD, "034"),
    ("Answer: -34", "-34", GOOD, "-34"),
    ("Answer: -0", "0", BAD, "-0"),
    ("Answer: 0", "-0", GOOD, "0"),
    ("Answer: \\frac12", "0.5", BAD, "\\frac{1}{2}"),  # the label is 0
    ("Answer: 0", "0.5", GOOD, "0"),
    ("Answer: 3", "3.9", GOOD, "3"),
    ("Answer: -3", "-3.9", GOOD, "-3"),
    ("Answer: 34", 34, GOOD, "34"),
    ("Answer: 34", 34.0, GOOD, "34"),
    ("Answer: 34", "34.0", GOOD, "34"),
    ("Answer: 34", "$34$", GOOD, "34"),
    ("Answer: 34", "x=34", GOOD, "34"),
    ("Answer: 1234", "1,234", GOOD, "1234"),
    ("Answer: 1000", "1e3", GOOD, "1000"),
    ("Answer: 12345678901234567890", "12345678901234567890", GOOD, "12345678901234567890"),
    ("Answer: ３４", "34", BAD, "３４"),
    ("Answer: thirty-four", "34", BAD, "thirty-four"),
    ("Answer: an apple", "34", BAD, "apple"),
    ("Answer: \\sqrt2", "34", BAD, "\\sqrt{2}"),
    ("Answer: $1$ or $34$", "34", BAD, "1"),  # the first pair of dollars counts
]


@pytest.mark.parametrize(("response", "label", "score", "pred"), CASES, ids=range(len(CASES)))
def test_answers(response, label, score, pred):
    assert compute_score(response, label) == {"score": score, "acc": score == GOOD, "pred": pred}


BOXED = [
    ("\\boxed{34}", "34", 1, "34"),
    ("\\boxed{35}", "34", -1, "35"),
    ("\\boxed{ 34}", "34", -1, " 34"),  # word for word
    ("\\boxed{34.0}", "34", -1, "34.0"),
    ("\\boxed{34}\\boxed{35}", "35", 1, "35"),
    ("34", "34", -1, None),
    ("", "34", -1, None),
    ("\\boxed{34", "34", -1, None),
    ("\\boxed{34}" + "." * 90, "34", 1, "34"),
    ("\\boxed{34}" + "." * 91, "34", -1, None),  # cut off
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1, "\\frac{1}{2}"),
    ("\\boxed{\\frac12}", "\\frac{1}{2}", -1, "\\frac12"),
    ("\\boxed{yes}", "yes", 1, "yes"),
    ("Answer: 34", "34", -1, None),
]


@pytest.mark.parametrize(("response", "label", "score", "pred"), BOXED, ids=range(len(BOXED)))
def test_the_strict_variant(response, label, score, pred):
    assert is_correct_strict_box(response, label) == (score, pred)
    assert compute_score(response, label, strict_box_verify=True) == {
        "score": float(score),
        "acc": score == 1,
        "pred": pred,
    }


def test_the_strict_variant_may_look_before_the_end():
    text = "\\boxed{1}" + "." * 200 + "\\boxed{2}" + "." * 50
    assert is_correct_strict_box(text, "2") == (1, "2")
    assert is_correct_strict_box(text, "1", [0, 0, 0, 100]) == (-1, "2")
    assert is_correct_strict_box(text[:150], "1", [0, 0, 0, 60]) == (1, "1")
    with pytest.raises(ValueError, match="has to have 4"):
        is_correct_strict_box(text, "1", [1])


BAD_LABELS = [
    "abc",
    "",
    "1/2",
    "\\frac{1}{2}",
    "(1,2)",
    "nan",
    "inf",
    "1e999",
    "1" * 500,
    None,
    ["1"],
    {"a": 1},
    "½",
    "--1",
]


@pytest.mark.parametrize("label", BAD_LABELS)
def test_labels_that_are_no_numbers(label):
    for response in ("", "Answer: 1"):
        with pytest.raises(ValueError, match="has to be a number"):
            compute_score(response, label)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("10 \\text{ inches}", "10\\text{}".replace("\\text{}", "")), ("\\frac34", "\\frac{3}{4}"),
        ("\\fracab", "\\frac{a}{b}"), ("\\sqrt3x", "\\sqrt{3}x"), ("\\frac{a}{b}", "\\frac{a}{b}"), ("5,000", "5000"),
        ("1,2,3", "123"), ("a,b", "a,b"), ("\\overline{3}", "3"), ("an ox", "ox"), ("7\\ldots", "7"), ('"7"', "7"),
        ("5\\;000", "5000"), ("\\text{4}\\text{5}", "45"), ("10\\mathrm{th}", "10"), ("$x$.$", "x"), ("a=b=7", "7"),
        ("\\mbox{7}", "7"), ("3,\\text{and}4", "34"), ("x\\text{and}y", "x,y"),
    ],
)  # fmt: skip
def test_the_form_of_minerva(text, form):
    assert normalize_final_answer(text) == form
