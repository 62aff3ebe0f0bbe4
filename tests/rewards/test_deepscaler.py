r"""``deepscaler`` and ``gemma_math``: which part of a response is looked at, and what labels may be."""

import pytest

from miles.rollout.rm_hub.deepscaler import (
    _pair,
    deepscaler_solution,
    gemma_solution,
    get_deepscaler_rule_based_reward,
    get_gemma_math_rule_based_reward,
)
from miles.rollout.rm_hub.math_compare import equal_by_algebra
from miles.rollout.rm_hub.math_text import same_text


def reward(solution_of, response, label):
    pair = _pair(solution_of, response, label)
    return int(pair is not None and (same_text(*pair) or equal_by_algebra(*pair)))


T, S, C = "</think>", "###Response", "<channel|>"
DEEPSCALER = [
    # response, label, reward
    (f"<think>hm{T} \\boxed{{4}}", "4", 1),
    (f"hm{T}\\boxed{{5}}", "4", 0),
    (f"hm{T}{T}\\boxed{{4}}", "4", 1),
    (f"\\boxed{{4}}{T} done", "4", 0),  # a box in the thoughts
    (f"\\boxed{{5}}{T}\\boxed{{4}}", "4", 1),
    (f"a{T}\\boxed{{4}}{T}b", "4", 0),  # after the last end only
    ("\\boxed{4}", "4", 0),  # nothing says where thoughts end
    ("", "4", 0),
    (T, "4", 0),
    (f"{T}4", "4", 0),  # no box
    (f"{S} \\boxed{{4}}", "4", 1),
    (f"\\boxed{{4}}{S} none", "4", 0),
    (f"{S}\\boxed{{4}}{S}\\boxed{{5}}", "4", 1),  # the part after the first
    (f"{S}\\boxed{{4}}{S}\\boxed{{5}}", "5", 0),
    (f"{S}\\boxed{{5}}{T}\\boxed{{4}}", "4", 1),  # thoughts come first
    (f"{T}\\boxed{{4}}{S}\\boxed{{5}}", "5", 1),
    (f"{T}\\boxed{{\\frac{{1}}{{2}}}}", "0.5", 1),
    (f"{T}\\boxed{{2\\sqrt{{3}}}}", "\\sqrt{12}", 1),
    (f"{T}\\boxed{{1,234}}", "1234", 1),
    (f"{T}\\boxed{{4}}", "", 0),
    (f"{T}\\boxed{{}}", "4", 0),
    (f"{T}\\boxed{{4", "4", 0),
    (f"{T}\\boxed{{4}} \\boxed{{5}}", "5", 1),
    (f"{T}\\boxed{{4}}", 4, 1),
    (f"{T}\\boxed{{4}}", 4.0, 1),
    (f"{T}\\boxed{{0}}", 0, 1),  # a number, not "no label"
    (f"{T}\\boxed{{0.5}}", 0.5, 1),
    (f"{T}\\boxed{{4}}", "\\boxed{4}", 1),
    (f"{T}\\boxed{{4}}", "\\boxed{4", 0),
    (f"{T}\\boxed{{[1,2)}}", "[1,2)", 1),
    (f"{T}\\boxed{{[1,2)}}", "(1,2)", 0),
    (f"{T}\\boxed{{日本}}", "日本", 1),
    (f"{T}\\fbox{{4}}", "4", 0),
    ("</THINK>\\boxed{4}", "4", 0),
    (f"{T}\\boxed{{4 \\text{{ cm}}}}", "4", 1),
    (f"{T}\\boxed{{" + "9" * 100_000 + "}", "9", 0),
]
GEMMA = [
    (f"hm{C}\\boxed{{4}}", "4", 1),
    (f"hm{C}\\boxed{{5}}", "4", 0),
    ("\\boxed{4}", "4", 1),  # without the mark all of it counts
    ("\\boxed{5}", "4", 0),
    (f"\\boxed{{4}}{C}", "4", 0),
    (f"\\boxed{{5}}{C}\\boxed{{4}}", "4", 1),
    (f"{C}\\boxed{{4}}{C}b", "4", 0),
    (f"{C}{C}\\boxed{{4}}", "4", 1),
    ("", "4", 0),
    (C, "4", 0),
    ("4", "4", 0),
    (f"\\boxed{{4}}{T}none", "4", 1),  # another model's mark is text
    (f"{C}\\boxed{{4}}", "", 0),
    (f"{C}\\boxed{{}}", "4", 0),
    (f"{C}\\boxed{{4", "4", 0),
    (f"{C}\\boxed{{0}}", 0, 1),
    (f"{C}\\boxed{{4}}", 4.0, 1),
    (f"{C}\\boxed{{4}}", "\\boxed{4}", 1),
    (f"{C}\\boxed{{0.5}}", "\\frac12", 1),
    (f"{C}\\boxed{{\\frac24}}", "\\frac12", 0),
    (f"{C}\\boxed{{x+1}}", "1+x", 1),
    (f"{C}\\boxed{{(1, 2)}}", "(1,2)", 1),
    (f"{C}\\boxed{{(2,1)}}", "(1,2)", 0),
    (f"{C}\\boxed{{50\\%}}", "50", 1),
    (f"{C}\\boxed{{-0}}", "0", 1),
    (f"{C}\\boxed{{3 1/2}}", "3.5", 1),
    (f"{C}\\boxed{{30^\\circ}}", "30", 1),
    (f"{C}\\boxed{{\\text{{A}}}}", "A", 1),
    (f"{C}\\boxed{{a}}\\boxed{{b}}", "b", 1),
    ("<channel|\\boxed{4}", "4", 1),
    (f"{C}" * 1000 + "\\boxed{4}", "4", 1),
]


@pytest.mark.parametrize(("response", "label", "expected"), DEEPSCALER, ids=range(len(DEEPSCALER)))
def test_deepscaler(response, label, expected):
    assert reward(deepscaler_solution, response, label) == expected


@pytest.mark.parametrize(("response", "label", "expected"), GEMMA, ids=range(len(GEMMA)))
def test_gemma_math(response, label, expected):
    assert reward(gemma_solution, response, label) == expected


@pytest.mark.parametrize("function", [get_deepscaler_rule_based_reward, get_gemma_math_rule_based_reward])
def test_functions_by_their_names(function):
    assert function(f"{T}{C}\\boxed{{4}}", "4") == 1
    assert function("", "4") == 0
    for label in (None, ["4"], {"a": 1}):
        with pytest.raises(ValueError, match="text or a number"):
            function(f"{T}\\boxed{{4}}", label)
