"""The lines of the live view: what is there, in trouble first, never wider or more than the terminal takes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.tracking.live_view import Cluster, view_lines
from miles.tracking.narrator import RunProgress

CLUSTER = Cluster(
    nodes=(("node-0", "alive"), ("node-1", "suspect"), ("node-2", "alive")),
    meshes=(("rollout", ("up",)), ("trainer", ("up", "up", "dead", "up"))),
    services=(("router", "ready"), ("engine-0", "ready"), ("engine-1", "starting")),
)


def progress(**fields):
    metrics = {"perf/step_time": 5.25, "perf/rollout_time": 3.0, "perf/train_time": 2.0, "perf/save_time": 0.01}
    run = RunProgress("run-1", 20, 5, "generate", 90.0, 32, 64, 1000, metrics)
    run.rewards.extend([0.1, 0.2, 0.9])
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def shown(run, *, width=100, height=24, cluster=CLUSTER, **options):
    lines = view_lines(run, cluster, width=width, height=height, now=100.0, began=30.0, **options)
    return [line.plain.rstrip() for line in lines]


def test_it_shows_nodes_ranks_services_times_reward_and_how_far_it_is():
    assert shown(progress(), run_dir=Path("/runs/a")) == [
        "run       run-1  0:01:10  /runs/a",
        "nodes     1 suspect: node-1  2 alive: node-0 node-2",
        "ranks     rollout: 1 up  trainer: 1 dead  3 up",
        "services  1 starting: engine-1  2 ready: router engine-0",
        "last step 5.2 s  generate 3.0  train 2.0",
        "reward    0.900  ▁▁█",
        "generate  ━━━━━━━━━━━━━━━━──────────────── 32/64  0:00:10  1000 tokens",
        "rollouts  ━━━━━━━━──────────────────────── 5/20",
    ]


def test_what_is_not_known_yet_is_left_out():
    assert shown(RunProgress(), cluster=Cluster()) == ["run       begins  0:01:10"]
    assert shown(progress(target=0, tokens=0))[-2] == "generate  0:00:10"


def test_of_many_nodes_some_are_named():
    nodes = tuple((f"node-{n}", "alive") for n in range(100))
    assert shown(progress(), cluster=Cluster(nodes))[1] == "nodes     100 alive: node-0 node-1 node-2 node-3 ..."


def test_of_a_low_terminal_the_most_needed_lines_are_kept_in_their_order():
    assert [line.split()[0] for line in shown(progress(), height=3)] == ["reward", "generate", "rollouts"]
    assert [line.split()[0] for line in shown(progress(), height=1)] == ["generate"]


def test_a_terminal_without_unicode_gets_none():
    assert all(line.isascii() for line in shown(progress(), is_ascii=True, width=30))


@given(width=st.integers(1, 200), height=st.integers(1, 30), is_ascii=st.booleans(), run_id=st.text(max_size=300))
def test_no_line_fills_the_terminals_width_and_all_fit_its_height(width, height, is_ascii, run_id):
    run = progress(run_id=" ".join(run_id.split()), num_rollout=10**9)
    lines = view_lines(run, CLUSTER, width=width, height=height, now=1e6, began=0.0, is_ascii=is_ascii)
    assert 1 <= len(lines) <= height
    assert max(line.cell_len for line in lines) <= max(1, width - 1)


@pytest.mark.parametrize("done", [0, 20, 25])
def test_a_bar_is_empty_full_and_no_longer_than_that(done):
    bar = shown(progress(done=done))[-1]
    assert bar.count("━") == {0: 0, 20: 32, 25: 32}[done]
    assert bar.count("━") + bar.count("─") == 32
