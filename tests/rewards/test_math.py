r"""The ``math`` reward: which box counts, and what counts as the same answer.

Verdicts are those of the rules (docs/rewards.md), worked out by hand.
"""

# ruff: noqa: RUF001 - characters that look like others are what is tested
import pytest

from miles.rollout.rm_hub.math_compare import equal_by_algebra, plain_form, quick_verdict
from miles.rollout.rm_hub.math_text import expected_answer, last_boxed, normalise, same_text
from miles.rollout.rm_hub.math_utils import answers_of, extract_answer

R, W = True, False

NUMBERS = r"""
4                   | 4                 | R
5                   | 4                 | W
04                  | 4                 | R
4.0                 | 4                 | R
4.                  | 4                 | R
 4                  | 4                 | R
+4                  | 4                 | R
-7                  | -7                | R
7                   | -7                | W
- 7                 | -7                | R
−7                  | -7                | R
-0                  | 0                 | R
-0.0                | 0                 | R
1,234               | 1234              | R
1,234,567           | 1234567           | R
12,34               | 1234              | W
1{,}234             | 1234              | R
1,\!234             | 1234              | R
1\,000              | 1000              | R
1e3                 | 1000              | R
1000                | 1e3               | R
10^3                | 1000              | W
2^{10}              | 1024              | W
４                   | 4                 | R
4.00000001          | 4                 | R
4.001               | 4                 | W
12345678901234567890 | 12345678901234567890 | R
12345678901234567891 | 12345678901234567890 | W
1 2                 | 3                 | W
four                | 4                 | W
4!                  | 24                | W
0.5                 | 0.50              | R
0.333               | 0.334             | W
.5                  | 0.5               | R
0.1                 | 1/10              | R
3.14                | \pi               | W
nan                 | nan               | R
inf                 | \infty            | R
"""

FRACTIONS = r"""
0.5                 | \frac{1}{2}       | R
1/2                 | 0.5               | R
\frac12             | \frac{1}{2}       | R
\frac1{2}           | \frac{1}{2}       | R
\frac 1 2           | \frac{1}{2}       | R
\dfrac{1}{2}        | 1/2               | R
\tfrac{1}{2}        | 1/2               | R
\cfrac{1}{2}        | 1/2               | R
\frac{2}{4}         | \frac{1}{2}       | W
2/4                 | 1/2               | W
0.333               | \frac{1}{3}       | W
0.25                | \frac{1}{4}       | R
-\frac{1}{2}        | \frac{-1}{2}      | R
\frac{1}{-2}        | -\frac{1}{2}      | R
\frac{4}{2}         | 2                 | W
2                   | \frac{4}{2}       | W
3\frac{1}{2}        | \frac{7}{2}       | R
3 1/2               | 7/2               | R
-3\frac{1}{2}       | -\frac{7}{2}      | R
-3\frac{1}{2}       | -\frac{5}{2}      | W
3\frac{1}{2}        | 3.5               | R
\frac{\frac{1}{2}}{3} | \frac{1}{6}     | R
\frac{x+1}{2}       | (x+1)/2           | R
\frac{x+1}{2}       | x+\frac{1}{2}     | W
\frac{1}{2x}        | \frac{1}{2}x      | W
\frac{3x}{2}        | \frac{3}{2}x      | R
2\frac{1}{x}        | \frac{2}{x}       | R
\frac{1}{0}         | \frac{2}{0}       | W
1//2                | 1/2               | W
\frac               | \frac{1}{2}       | W
\frac{1}            | 1                 | W
"""

ROOTS_AND_ALGEBRA = r"""
\sqrt3              | \sqrt{3}          | R
\sqrt 3             | \sqrt{3}          | R
2\sqrt{3}           | \sqrt{12}         | R
\sqrt{12}           | 2\sqrt{3}         | R
\frac{1}{\sqrt{2}}  | \frac{\sqrt{2}}{2} | R
\sqrt{2}            | 1.414             | W
\sqrt{4}            | 2                 | W
\sqrt[3]{2}         | \sqrt{2}          | W
\sqrt[3]{2}         | \sqrt[3]{2}       | R
x\sqrt{2}           | \sqrt{2}x         | R
x^2+2x+1            | (x+1)^2           | R
x^2+2x+2            | (x+1)^2           | W
3x                  | x*3               | R
3x                  | x\cdot 3          | R
3x                  | x \times 3        | R
y=3x                | 3x                | R
x = 5               | 5                 | R
f(x)=5              | 5                 | W
5=x                 | 5                 | W
\pi/2               | \frac{\pi}{2}     | R
2\pi                | \pi\cdot2         | R
a+b                 | b+a               | R
a+b+c               | c+b+a             | W
a+b+c               | a+b+c             | R
xyz                 | zyx               | W
2^{x+1}             | 2^x+1             | W
2^{x+1}             | 2\cdot2^x         | R
e^{-x}              | \frac{1}{e^x}     | R
x^{10}+1            | 1+x^{10}          | W
x^{10}              | x^{10}            | R
2^3^2               | 512               | W
x_1+x_2             | x_2+x_1           | R
|x|                 | |x|               | R
x<5                 | 5>x               | W
5!                  | 5!                | R
n!                  | n(n-1)!           | R
"""

TUPLES_UNITS_TEXT = r"""
(1, 2)              | (1,2)             | R
(2,1)               | (1,2)             | W
(1,2,3)             | (1,2)             | W
(1,2)               | [1,2]             | W
[1,2)               | (1,2)             | W
[1,2)               | [1,2)             | R
(0.5,3)             | (\frac{1}{2},3)   | R
(\frac{1}{2}, 3)    | (1/2,3)           | R
(\sqrt{12},1)       | (2\sqrt{3},1)     | R
(1.0,2)             | (1,2)             | R
(1,2)(3,4)          | (3,4)(1,2)        | W
((1,2),3)           | ((1.0,2),3)       | W
((1,2),3)           | (1,2,3)           | W
(1,234,5)           | (1234,5)          | R
\left(1,2\right)    | (1,2)             | R
\left[0,1\right)    | [0,1)             | R
(-\infty, 3]        | (-\infty,3]       | R
(-\infty,3.0]       | (-\infty,3]       | R
(-\infty,2)\cup(3,4) | (-\infty,2)\cup(3,4) | R
\{1,2\}             | \{1, 2\}          | R
\{2,1\}             | \{1,2\}           | W
1,2                 | 2,1               | W
1 and 2             | 1,2               | R
1 or 2              | 1,2               | R
5 \text{ cm}        | 5                 | R
5\text{ cm}^2       | 5                 | R
5 cm                | 5                 | R
5 miles             | 5                 | R
5 inches            | 5                 | R
5 dollars           | 5                 | W
30^\circ            | 30                | R
30^{\circ}          | 30                | R
30 degrees          | 30                | R
50\%                | 50                | R
50%                 | 50                | R
50\%                | 0.5               | W
\$3                 | 3                 | R
$3$                 | 3                 | R
2 million           | 2*10^6            | R
2 million           | 2000000           | W
\text{(A)}          | (A)               | R
\text{Tuesday}      | Tuesday           | R
\text{tuesday}      | Tuesday           | R
\mathrm{A}          | A                 | R
\text{yes}          | \text{no}         | W
\text{ yes}         | \text{ no}        | W
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix} | R
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix} | W
{7}                 | 7                 | R
                    | 4                 | W
\text{}             | 4                 | W
                    | 0                 | W
$                   | 0                 | W
\                   | 0                 | W
}                   | 4                 | W
日本                  | 日本                | R
日本                  | 4                 | W
½                   | 0.5               | W
x²                  | x^2               | W
import os           | 4                 | W
__import__('os')    | x                 | W
lambda: 3           | 3                 | W
"""


def rows(*tables):
    """``given | label | R or W``."""
    for table in tables:
        for line in table.strip("\n").splitlines():
            given, label, verdict = line.rsplit(" | ", 2)
            yield given.rstrip(), label.strip(), {"R": R, "W": W}[verdict.strip()]


CASES = list(rows(NUMBERS, FRACTIONS, ROOTS_AND_ALGEBRA, TUPLES_UNITS_TEXT))


def verdict(response, label):
    """The reward as a truth value, with algebra in this process."""
    pair = answers_of(response, label)
    return pair is not None and (same_text(*pair) or equal_by_algebra(*pair))


@pytest.mark.parametrize(("given", "label", "right"), CASES)
def test_answers(given, label, right):
    assert verdict(f"so it is \\boxed{{{given}}}." if given != "}" else "\\boxed{", label) is right


@pytest.mark.parametrize(("given", "label", "right"), CASES)
def test_a_quick_verdict_is_that_of_algebra(given, label, right):
    quick = same_text(given, label) or quick_verdict(given, label)
    assert quick is None or bool(quick) is right


BOXES = [
    ("no box", None),
    ("", None),
    ("\\boxed{1}", "1"),
    ("\\boxed{1} and \\boxed{2}", "2"),
    ("\\boxed{1} and \\boxed{2", None),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{3}}", "3"),
    ("\\boxed{a{b{c}d}e}f}", "a{b{c}d}e"),
    ("\\boxed{never closed", None),
    ("\\boxed", None),
    ("\\boxed 7$ is it", None),
    ("\\boxed {7}", "7"),
    ("\\boxed{}", ""),
    ("\\boxed{ 4 }", " 4 "),
    ("\\boxed{1\n2}", "1\n2"),
    ("\\boxedx{1}", None),
    ("boxed{1}", None),
    ("\\\\boxed{1}", "1"),
    ("\\fbox{3}", None),
    ("\\boxed{1} \\fbox{3}", "1"),
    ("\\boxed{" * 3000, None),
    ("\\boxed{" + "{" * 9000 + "}" * 9001, "{" * 9000 + "}" * 9000),
    ("\\boxed{" + "{" * 500_000, None),
    ("\\boxed{" + "9" * 1_000_000 + "}", "9" * 1_000_000),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("<think>\\boxed{1}</think>", "1"),
    ("\\boxed{日本}", "日本"),
    ("$$\\boxed{x}$$.", "x"),
    ("\\boxed{1}\\boxed{}", ""),
    ("\\boxed }{1}", None),
]


@pytest.mark.parametrize(("text", "found"), BOXES, ids=range(len(BOXES)))
def test_the_last_box_counts(text, found):
    assert extract_answer(text) == found


def test_a_frame_counts_where_there_is_no_box():
    assert last_boxed("\\fbox{3}") == "3"
    assert last_boxed("\\fbox{3} \\boxed{4} \\fbox{5}") == "4"


@pytest.mark.parametrize(
    ("label", "right"),
    [(None, W), ("", W), (0, W), (4, R), (4.0, R), ("4", R), ("\\boxed{4}", R), ("\\boxed{4", W), (["4"], W), (5, W)],
)
def test_labels_of_other_kinds(label, right):
    assert verdict("\\boxed{4}", label) is right


def test_a_label_in_a_box():
    assert expected_answer("so \\boxed{4}") == "4"
    assert expected_answer("4") == "4"


@pytest.mark.parametrize(
    ("given", "expected", "told"),
    [("17", "18", W), ("18", "18", R), ("17", "18.0", W), ("1/2", "2/4", W), ("x+1", "1+x", None),
     ("\\frac{1}{2}", "0.5", None), ("9" * 2000, "9", W), ("(1,2)", "(1,3)", W), ("(x+1,2)", "(1+x,3)", W)],
)  # fmt: skip
def test_what_is_decided_without_a_grader(given, expected, told):
    assert quick_verdict(given, expected) is told


def test_normalising_twice_changes_nothing_more():
    for given, label, _ in CASES:
        for text in (given, label):
            assert plain_form(plain_form(text)) == plain_form(text)
            if "\\\\" not in text:
                assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\\frac12", "\\frac{1}{2}"), ("\\frac1{72}", "\\frac{1}{72}"), ("\\frac{1}2", "\\frac{1}2"),
        ("0.5", "\\frac{1}{2}"), ("3/4", "\\frac{3}{4}"), ("03/4", "03/4"), ("x/4", "x/4"), ("3/4/5", "3/4/5"),
        ("k = 5", "5"), ("abc = 5", "abc=5"), ("a=b=c", "a=b=c"), (" .5", "0.5".replace("0.5", "\\frac{1}{2}")),
        ("\\{.5\\}", "\\{0.5\\}"), ("10\\text{ m}", "10"), ("\\text{ m}", "m"), ("90^\\circ", "90"),
        ("\\left(\\tfrac12\\right)", "(\\frac{1}{2})"), ("\\sqrt2", "\\sqrt{2}"), ("50\\%", "50"), ("a\\!b", "ab"),
    ],
)  # fmt: skip
def test_the_form_of_the_benchmark(text, form):
    assert normalise(text) == form
