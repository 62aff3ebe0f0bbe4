r"""Graders: answers that hang them, kill them or want too much cost that answer only; none is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.procs import alive, eventually, process_identity
from support.rollout_cases import adds, make_args, make_config, manager, servers, sums

from miles.rollout.rm_hub import async_rm, grader_pool
from miles.rollout.rm_hub.grader_pool import GraderPool, NoGrader, close_grader_pool, take_num_lost
from miles.rollout.rm_hub.math_utils import grade_answer_sympy, grade_answer_verl
from miles.utils.http_utils import close_http_client
from miles.utils.types import Sample

ECHO = """
import json, os, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    given = json.loads(line)["given"]
    if given == "hang": time.sleep(60)
    while given == "spin": pass
    if given == "die": os._exit(3)
    print(json.dumps({"equal": given == "right"}), flush=True)
"""
"""A grader that does as it is told."""


@pytest.fixture
def pool():
    made = GraderPool(size=1, deadline_s=20.0)
    yield made
    made.close()


@pytest.fixture
def scripted():
    made = GraderPool(size=2, deadline_s=20.0, command=(sys.executable, "-c", ECHO))
    yield made
    made.close()


@pytest.mark.full
async def test_a_grader_that_is_killed_or_stopped_costs_itself_only(pool, caplog):
    assert await pool.equal("2\\sqrt{3}", "\\sqrt{12}")
    [pid] = pool.pids()
    os.kill(pid, signal.SIGKILL)
    assert not await pool.equal("3\\sqrt{3}", "\\sqrt{27}")  # the answer that was lost counts as wrong
    assert await pool.equal("3\\sqrt{3}", "\\sqrt{27}")  # once: it is tried again
    [pid] = pool.pids()
    pool.deadline_s = 0.05
    os.kill(pid, signal.SIGSTOP)
    assert not await pool.equal("x+1", "1+x")
    assert pool.num_lost == 2
    await eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    pool.deadline_s = 20.0
    assert await pool.equal("x+1", "1+x")
    assert "took longer than 0.1 s of processor time, or 0.5 s" in caplog.text


@pytest.mark.full
async def test_an_answer_that_costs_two_graders_is_not_tried_again(scripted):
    scripted.deadline_s = 0.2
    assert await scripted.equal("right", "x")
    for _ in range(5):
        assert not await scripted.equal("spin", "x")
        assert not await scripted.equal("die", "x")
    assert scripted.num_lost == 4
    assert await scripted.equal("right", "y")
    assert not await scripted.equal("wrong", "y")


@pytest.mark.full
async def test_a_grader_that_gets_no_processor_is_waited_for(scripted):
    """A right answer stays right on a machine that has no time for its grader."""
    scripted.deadline_s = 1.0
    assert await scripted.equal("right", "x")
    [pid] = scripted.pids()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    asked = asyncio.ensure_future(scripted.equal("right", "y"))
    await eventually(lambda: time.monotonic() > began + 1.5 * scripted.deadline_s)
    os.kill(pid, signal.SIGCONT)
    assert await asked
    assert scripted.num_lost == 0 and scripted.pids() == [pid]


@pytest.mark.full
async def test_lost_gradings_are_told_with_the_next_rollout(tmp_path):
    take_num_lost()
    config = make_config(prompt_data=sums(tmp_path / "p.jsonl"), run_dir=str(tmp_path))
    try:
        with servers(adds) as fake, manager(config) as rollout:
            await rollout.start(fake.targets, fake.router.url, "secret")
            pool = grader_pool.grader_pool()
            assert await pool.equal("x+1", "1+x")
            os.kill(pool.pids()[0], signal.SIGKILL)
            assert not await pool.equal("x+2", "2+x")
            assert (await rollout.generate(0)).metrics["rollout/lost_gradings"] == 1
            assert "rollout/lost_gradings" not in (await rollout.generate(1)).metrics
    finally:
        close_http_client()


@pytest.mark.full
async def test_others_go_on_while_one_hangs_and_closing_does_not_wait(scripted):
    hanging = asyncio.ensure_future(scripted.equal("hang", "x"))
    assert [await scripted.equal("right", str(i)) for i in range(50)] == [True] * 50
    await eventually(lambda: len(scripted.pids()) == 2)
    graders = [process_identity(pid) for pid in scripted.pids()]
    began = time.monotonic()
    await asyncio.to_thread(scripted.close)
    assert not await hanging
    assert time.monotonic() - began < 5.0
    await eventually(lambda: not any(map(alive, graders)))
    with pytest.raises(RuntimeError):
        await scripted.equal("right", "x")


@pytest.mark.full
async def test_a_grader_that_cannot_start_is_an_error_and_no_wrong_answer():
    pool = GraderPool(size=1, command=(sys.executable, "-c", "raise SystemExit(7)"))
    try:
        with pytest.raises(NoGrader, match="3 attempts; the last ended with 7"):
            await pool.equal("x+1", "1+x")
    finally:
        pool.close()


BOMBS = [
    "9^{9^{9^{9}}}", "9^{9^{9}}+x", "((9^9)^9)^9+\\pi", "99999!+x", "9!!!!!+x", "{" * 900 + "x" + "}" * 900,
    "(" * 400 + "x" + ")" * 400, "\\frac{" * 150 + "x" + "}{2}" * 150, "\\frac" * 190,
    "\\sqrt{" * 160 + "x" + "}" * 160, "9" * 1_000_000, "9" * 999 + "x", "x" + "^2" * 400, "\\left(" * 160,
    "\\begin{a}" * 110, "\\\\" * 499, "\\x" * 499, "x_{1}" * 190, "\u202e\u0000x", "٣" * 300 + "x", "1e999999999+x",
    "x!" * 400, "-" * 900 + "x", "\\input{/etc/passwd}", "__import__('os').system('sleep 100')", "(x+y)^9" * 100,
    "$" * 999, "\\text{" * 160, "%" * 999, "(x+1)^9(x-1)^9(y+1)^9(y-1)^9(x+y)^9(x-y)^9+1", "1,234" * 199, "1 " * 499,
    "sqrt" * 240 + "(x)", "\\cdot" * 190,
]  # fmt: skip


def peak_kb(pid):
    """The most memory that a process has had."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.full
async def test_bombs_cost_no_more_than_their_deadline(pool):
    """Each is graded by a real grader, also after the others; its memory stays small."""
    pool.deadline_s = 5.0
    began = time.monotonic()
    await pool.equal("x", "1+x")
    for bomb in BOMBS:
        for label in ("x", "\\frac{x+1}{2}"):
            await pool.equal(bomb, label)
    assert pool.num_lost == 0  # none even reaches its deadline
    assert time.monotonic() - began < 15.0
    [pid] = pool.pids()
    assert peak_kb(pid) < 400 * 1024
    assert await pool.equal("\\sqrt{12}", "2\\sqrt{3}")


@pytest.mark.full
async def test_the_loop_goes_on_while_answers_are_graded():
    beats = 0

    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.005)
            beats += 1

    task = asyncio.ensure_future(beat())
    try:
        samples = [
            Sample(response=f"\\boxed{{{i}\\sqrt{{3}}+x}}", label=f"x+\\sqrt{{{3 * i * i}}}") for i in range(2, 40)
        ]
        assert await asyncio.gather(*(async_rm(make_args(), sample) for sample in samples)) == [1] * 38
        assert beats > 20
    finally:
        task.cancel()
        close_grader_pool()


@pytest.mark.full
def test_ordinary_functions_wait_for_graders_from_any_thread():
    try:
        found = []
        threads = [
            threading.Thread(target=lambda i=i: found.append(grade_answer_sympy(f"x+{i}", f"{i}+x"))) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 8
        assert grade_answer_verl("\\boxed{\\frac{x+1}{2}}", "(1+x)/2")
        assert len(grader_pool.grader_pool().pids()) <= 4
    finally:
        close_grader_pool()


LIVES = """
import os, sys
from miles.rollout.rm_hub.grader_pool import grader_pool
from miles.rollout.rm_hub.math_utils import grade_answer_sympy
assert grade_answer_sympy("x+1", "1+x")
print(*grader_pool().pids(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.full
def test_no_grader_outlives_its_process():
    ends = ("sys.exit(0)", "os._exit(1)", "os.kill(os.getpid(), 9)")
    processes = [
        subprocess.Popen([sys.executable, "-c", LIVES + end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for end in ends
    ]
    for process in processes:
        with process:
            graders = [process_identity(int(pid)) for pid in process.stdout.readline().split()]
            assert graders
            assert all(map(alive, graders))
            process.communicate("go\n", timeout=20)
            asyncio.run(eventually(lambda graders=graders: not any(map(alive, graders))))


@pytest.mark.full
def test_a_forked_process_has_graders_of_its_own():
    code = """
import os
from miles.rollout.rm_hub.grader_pool import grader_pool
from miles.rollout.rm_hub.math_utils import grade_answer_sympy
assert grade_answer_sympy("x+1", "1+x")
mine = grader_pool().pids()
child = os.fork()
if not child:
    ok = grade_answer_sympy("x+2", "2+x") and not set(grader_pool().pids()) & set(mine)
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert grade_answer_sympy("x+3", "3+x") and grader_pool().pids() == mine
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
