"""Whatever a model writes: each check says yes or no, at once."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.instruction_cases import CASES

from miles.rollout.rm_hub.ifbench_checks import BUILT

PIECES = st.sampled_from([
    "the", "and", "I", "level", "Question 1:", "A)", "a", "Zimbabwe", "1805-12-02", "42", "P.S.", "Mr.", "e.g.",
    "don't", ".", "!", "?", "...", ",", ";", "\n", "\n\n", " ", "\t", "*", "**", "***", "******", "-", "- ", "* ",
    "<<", ">>", "<i>", "</i>", "[", "]", "(", ")", "{", "}", '"', "'", "\u201c", "\u2019", "/", "|", "```json",
    "\u00e9", "e\u0301", "\u3053", "\u6587", "\u3002", "\U0001f600", "\ufe0f", "\u200d", "\u202e", "\x00", "\ud800",
    "\u00df", "\u0130", "\ufb01",
])  # fmt: skip
TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join))
KWARGS = {name: kwargs for name, kwargs, _, _ in CASES}
CHECKS = [(found.check, found.arguments(KWARGS[name], "")) for name, found in BUILT.items()]
QUICK = [pair for pair, found in zip(CHECKS, BUILT.values(), strict=True) if not found.needs]
SLOW = [pair for pair, found in zip(CHECKS, BUILT.values(), strict=True) if found.needs]
LENGTH = 20_000
LONG = ("a", "\n", "[", '"', "*a", "<<", "1. ", ". ", "a\n\n", "don't ", "Question 1", "\U0001f600")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_checks_of_any_text(text):
    for check, arguments in QUICK:
        assert check(text, **arguments) in (True, False)


@pytest.mark.full
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_checks_of_any_text_with_packages(text):
    for check, arguments in SLOW:
        assert check(text, **arguments) is check(text, **arguments)


@pytest.mark.full
@pytest.mark.parametrize("piece", LONG)
def test_checks_of_long_texts_end(piece):
    """What backtracks, or compares all with all, takes minutes."""
    text = (piece * LENGTH)[:LENGTH]
    slow = []
    for check, arguments in CHECKS:
        began = time.process_time()
        check(text, **arguments)
        if (took := time.process_time() - began) > 10.0:
            slow.append((check.__name__, took))
    assert not slow
