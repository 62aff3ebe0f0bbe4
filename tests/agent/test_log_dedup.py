"""Merging what many ranks say alike, and choosing what a person sees. Nothing may be lost."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_agents.agent.log_dedup import LogDedup, rank_ranges, template, wanted


def shown(lines):
    return [str(line) for line in lines]


def forwarded(lines, rank=1):
    state, out = None, []
    for line in lines:
        want, state = wanted(rank, line, state)
        if want:
            out.append(line)
    return out


def test_the_first_line_comes_at_once_and_repeats_of_other_ranks_when_the_window_ends():
    dedup = LogDedup(window_s=3)
    assert shown(dedup.add("trainer", 0, "loaded in 1.5 s", now=0)) == ["[trainer 0] loaded in 1.5 s"]
    for rank in (1, 2, 3, 7):
        assert dedup.add("trainer", rank, f"loaded in {rank}.25 s", now=1) == []
    assert dedup.next_deadline() == 3
    assert dedup.tick(2.9) == []
    assert shown(dedup.tick(3)) == ["[trainer 1-3,7] (x4, numbers differ) loaded in 1.25 s"]
    assert dedup.next_deadline() is None


def test_after_the_window_a_line_is_new_again():
    dedup = LogDedup(window_s=3)
    dedup.add("trainer", 0, "hello", now=0)
    assert dedup.tick(3) == []
    assert shown(dedup.add("trainer", 1, "hello", now=3)) == ["[trainer 1] hello"]


def test_a_line_repeated_by_the_same_rank_is_shown_each_time():
    dedup = LogDedup()
    for _ in range(50):
        assert shown(dedup.add("trainer", 0, "step", now=0)) == ["[trainer 0] step"]


def test_repeats_of_repeats_find_each_their_own():
    dedup = LogDedup()
    for rank in (0, 1, 2):
        for _ in range(3):
            dedup.add("trainer", rank, "step", now=0)
    assert shown(dedup.flush()) == ["[trainer 1-2] (x2) step"] * 3


def test_groups_are_not_merged_with_each_other():
    dedup = LogDedup()
    dedup.add("trainer", 0, "hello", now=0)
    assert shown(dedup.add("engine", 1, "hello", now=0)) == ["[engine 1] hello"]


@pytest.mark.parametrize(
    "line", ["17", "1.5 2.5e-3", "[0, 1, 2]", "0xdeadbeef", "3f1b1a0e-8c1d-4c39-9d5e-0123456789ab"]
)
def test_lines_of_nothing_but_numbers_are_never_merged(line):
    dedup = LogDedup()
    dedup.add("trainer", 0, line, now=0)
    assert shown(dedup.add("trainer", 1, line, now=0)) == [f"[trainer 1] {line}"]


def test_numbers_hex_and_uuids_are_masked_and_nothing_else():
    assert template("at 0x7f00 id 3f1b1a0e-8c1d-4c39-9d5e-0123456789ab in 1.5e-3 s") == "at # id # in # s"
    assert template("commit 3fc0a66e12 of facade") == "commit # of facade"
    assert template("-----") == "-----"


def test_a_new_line_of_a_rank_brings_out_what_is_held_of_it_first():
    dedup = LogDedup()
    dedup.add("trainer", 0, "a", now=0)
    dedup.add("trainer", 1, "a", now=0)
    assert shown(dedup.add("trainer", 1, "different", now=0)) == ["[trainer 1] (x1) a", "[trainer 1] different"]


def test_what_is_held_is_bounded():
    dedup = LogDedup()
    held = 0
    for number in range(10_000):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        held += len(dedup.add("trainer", 0, word, now=0)) == 0
        dedup.add("trainer", 1, word, now=0)
    assert held == 0
    assert len(dedup.flush()) <= 2048


TEXTS = st.sampled_from(["a", "b", "b 1", "b 2", "c 0xff", "7", "", "d"])
LINES = st.lists(st.tuples(st.integers(0, 3), TEXTS, st.floats(0, 2), st.booleans()), max_size=60)


@given(LINES)
def test_every_line_is_represented_once_and_in_order_for_each_rank(lines):
    dedup = LogDedup(window_s=3)
    given_lines, got = defaultdict(list), []
    now = 0.0
    for rank, text, pause, flush in lines:
        now += pause
        got += dedup.tick(now)
        deadline = dedup.next_deadline()
        assert deadline is None or now < deadline <= now + 3
        given_lines[rank].append(template(text) or text)
        out = dedup.add("g", rank, text, now)
        # Either this very line is the last thing said, or an equal line was said before and this one is held.
        assert not out or (out[-1].ranks, out[-1].text, out[-1].repeat) == ((rank,), text, False)
        got += out
        got += dedup.flush() if flush else []
    got += dedup.flush()
    represented = defaultdict(list)
    for line in got:
        assert len(set(line.ranks)) == len(line.ranks)
        for rank in line.ranks:
            represented[rank].append(template(line.text) or line.text)
    assert represented == given_lines
    assert dedup.flush() == []


@given(LINES)
def test_a_line_is_held_only_if_an_equal_one_was_shown_before(lines):
    dedup = LogDedup(window_s=3)
    said = set()
    for rank, text, _, _ in lines:
        if dedup.add("g", rank, text, 0.0):
            said.add(template(text))
        else:
            assert template(text) in said


@given(st.sets(st.integers(0, 40)))
def test_rank_ranges_name_every_rank(ranks):
    read = set()
    for part in filter(None, rank_ranges(tuple(ranks)).split(",")):
        low, _, high = part.partition("-")
        read |= set(range(int(low), int(high or low) + 1))
    assert read == ranks


def test_rank_0_is_forwarded_fully():
    lines = ["hello", "WARNING: x", "Traceback (most recent call last):", "  File", "ValueError: x", "again"]
    assert forwarded(lines, rank=0) == lines


@pytest.mark.parametrize(
    "line",
    [
        "WARNING:root:careful",
        "2026-08-22 10:00:00,123 - miles.train - ERROR - bad",
        "[rank3] CRITICAL it is over",
        "W0822 12:00:00.000000 123 file.cpp:10] glog",
        "/a/b.py:3: UserWarning: odd",
        "node-a:12:34 [0] NCCL WARN Call to connect failed",
        "Fatal Python error: Segmentation fault",
        "torch.OutOfMemoryError: CUDA out of memory",
        "train.py: error: unrecognized arguments",
        "terminate called after throwing an instance of 'c10::Error'",
    ],
)
def test_other_ranks_forward_what_is_severe(line):
    assert forwarded([line]) == [line]


@pytest.mark.parametrize("line", ["step 3 loss 1.5", "0 errors", "INFO:root:fine", "no warnings", "", "error_rate=0"])
def test_other_ranks_forward_nothing_else(line):
    assert forwarded([line]) == []


def test_a_traceback_is_forwarded_whole_and_no_further():
    traceback = [
        "Traceback (most recent call last):",
        '  File "train.py", line 3, in <module>',
        "    main()",
        "KeyError: 'prompt'",
        "During handling of the above exception, another exception occurred:",
        "Traceback (most recent call last):",
        "  File x",
        "StopIteration",
    ]
    assert forwarded(["before", *traceback, "after", "  indented, after"]) == traceback


def test_a_traceback_whose_lines_carry_a_prefix_is_forwarded_whole():
    traceback = [
        "[rank3]: Traceback (most recent call last):",
        '[rank3]:   File "train.py", line 3',
        "[rank3]:     main()",
        "[rank3]: torch.Oops",
    ]
    assert forwarded(["before", *traceback, "[rank3]: after"]) == traceback


def test_a_stack_dump_of_all_threads_is_forwarded():
    dump = ["Current thread 0x00007f (most recent call first):", '  File "a.py", line 1 in f', '  File "b.py", line 2']
    assert forwarded(["x", *dump]) == dump
