"""Each instruction of ``ifbench``: responses that follow it, and responses that do not."""

from collections import Counter

import pytest
from support.instruction_cases import CASES

from miles.rollout.rm_hub.ifbench_checks import BUILT, find


def follows(name, kwargs, text):
    instruction = find(name)
    return instruction.check(text, **instruction.arguments(kwargs, ""))


QUICK = [case for case in CASES if not BUILT[case[0]].needs]
SLOW = [case for case in CASES if BUILT[case[0]].needs]


@pytest.mark.parametrize(("name", "kwargs", "verdict", "text"), QUICK)
def test_check(name, kwargs, verdict, text):
    assert follows(name, kwargs, text) is verdict


@pytest.mark.full
@pytest.mark.parametrize(("name", "kwargs", "verdict", "text"), SLOW)
def test_check_with_a_package(name, kwargs, verdict, text):
    assert follows(name, kwargs, text) is verdict


def test_every_check_has_cases_of_both_kinds():
    counted = Counter((name, verdict) for name, _, verdict, _ in CASES)
    lacking = [(name, verdict) for name in BUILT for verdict in (True, False) if counted[name, verdict] < 2]
    assert not lacking
    assert {name for name, *_ in CASES} == set(BUILT)
