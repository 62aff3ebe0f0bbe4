"""Real jobs inside other programs, by the examples of docs/embedding.md, and the commands for runs that are alive."""

import http.client
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import closing, contextmanager
from fcntl import ioctl

import psutil
import pytest
from support.procs import eventually_sync
from support.recorded_rollouts import write_rollouts
from support.terminal import Terminal
from support.training_runs import ROOT, all_gone, command, environment

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
EXAMPLES = ROOT / "examples" / "embedding"
FAST = {"--debug-train-only": True, "--colocate": True, "--train-backend": "fsdp"}


def flags(tmp_path, **more):
    """Words of a job that trains on recorded rollouts: no engine is needed."""
    recorded = write_rollouts(tmp_path / "recorded", rollouts=int(more["--num-rollout"]), groups=2, per_group=4)
    own = {**FAST, "--load-debug-rollout-data": recorded, "--rollout-batch-size": 2, "--n-samples-per-prompt": 4}
    argv, run_dir = command(tmp_path, {**own, **more})
    return argv[2:], run_dir


def miles(*words):
    argv = [sys.executable, "-m", "miles_launcher.cli", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False, env=environment())


def test_three_jobs_queue_for_two_nodes(tmp_path):
    words, _ = flags(tmp_path, **{"--num-rollout": 1, "--run-dir": None})
    done = subprocess.run(
        [sys.executable, EXAMPLES / "scheduler.py", *words], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()
    assert [line.split()[2] for line in told[:2]] == ["left", "right"]
    third = next(index for index, line in enumerate(told) if line.startswith("job-2 gets"))
    assert any("iteration 1 of 1" in line for line in told[:third]), "before a node was free"
    assert sorted(line for line in told if line.endswith(": finished")) == [f"job-{n}: finished" for n in range(3)]
    for number in range(3):
        (row,) = (tmp_path / f"runs/queued-{number}/metrics.jsonl").read_text().splitlines()
        assert json.loads(row)["event"] == "rollout"


class Client(http.client.HTTPConnection):
    """Speaks to a service on a unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=200)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(200)
        self.sock.connect(self.path)

    def ask(self, method, path, body=None, token="let-me-in"):
        """Status and what was answered."""
        with closing(self), self.begin(method, path, body, token) as response:
            return response.status, json.load(response)

    def begin(self, method, path, body=None, token="let-me-in"):
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.request(method, path, json.dumps(body) if body else None, headers)
        return self.getresponse()


@contextmanager
def service(tmp_path):
    path = tmp_path / "s"
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "service.py", "--unix-socket", path], cwd=tmp_path,
        env={**environment(), "JOBS_TOKEN": "let-me-in"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually_sync(path.exists, 100)
        yield process, lambda: Client(path)
    finally:
        process.terminate()
        process.wait(200)


def test_a_service_starts_watches_and_stops_jobs_and_commands_find_them(tmp_path):
    words, run_dir = flags(tmp_path, **{"--num-rollout": 300})
    with service(tmp_path) as (process, client), closing(client()) as watching:
        assert client().ask("GET", "/jobs", token="guess")[0] == 401
        code, refused = client().ask("POST", "/jobs", {"flags": ["--lr", "fast"]})
        assert code == 422
        assert "--lr" in {problem["flag"] for problem in refused["problems"]}
        _, started = client().ask("POST", "/jobs", {"flags": words})
        assert started["run_dir"] == str(run_dir)
        with watching.begin("GET", f"/jobs/{started['name']}/events") as events:
            below = until_a_step(events, client, process, started["name"])
            look_at(run_dir)
            stopped = miles("stop", "--run", run_dir)
            assert stopped.returncode == 0, stopped.stderr
            assert "1 node (node-0)" in stopped.stdout and "trainer (1 rank)" in stopped.stdout
            last = [json.loads(line) for line in events.read().splitlines()][-1]
        assert (last["outcome"], last["error"]["code"]) == ("cancelled", "E-JOB-003")
        assert all_gone(below)
        assert client().ask("GET", "/jobs")[1][0]["state"] == "cancelled"
        _, rows = client().ask("GET", f"/jobs/{started['name']}/metrics")
        assert rows[0]["rollout_id"] == 0 and "train/loss" in rows[0]
        assert process.poll() is None, "stopping a job ends no service"


def until_a_step(events, client, process, name):
    """Follow a job until it has trained once; what runs below the service then."""
    seen = []
    while not seen or seen[-1]["event"] not in ("Step", "Ended"):
        seen.append(json.loads(events.readline()))
    assert seen[-1]["event"] == "Step", seen[-1]
    assert [one["name"] for one in seen if one["event"] == "Phase"][:3] == ["nodes", "start", "generate"]
    _, status = client().ask("GET", f"/jobs/{name}")
    assert (status["state"], status["num_rollout"]) == ("running", 300)
    below = psutil.Process(process.pid).children(recursive=True)
    assert {rank["pid"] for rank in status["ranks"]} <= {child.pid for child in below}
    return below


def look_at(run_dir):
    """What the commands show of a run that is alive."""
    status = miles("status", "--run", run_dir)
    assert "of 300" in status.stdout and "mesh trainer" in status.stdout, status.stderr
    logs = miles("logs", "--run", run_dir)
    assert {"trainer-0", "rollout-0", "agent-node-0"} <= {line.split(" ")[0] for line in logs.stdout.splitlines()}
    assert miles("logs", "--run", run_dir, "trainer-0").returncode == 0
    stack = miles("stack", "--run", run_dir, "trainer[0]")
    assert stack.stdout.startswith("trainer[0] on node-0, pid "), stack.stderr
    assert "thread MainThread" in stack.stdout


def test_a_run_on_a_terminal_shows_a_live_view_and_is_stopped_in_good_order(tmp_path):
    words, run_dir = flags(tmp_path, **{"--num-rollout": 300})
    env = {name: value for name, value in environment().items() if name not in ("NO_COLOR", "COLUMNS")}
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        argv = [sys.executable, str(ROOT / "train.py"), *words]
        os.execve(argv[0], argv, {**env, "TERM": "xterm-256color"})
    try:
        ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        terminal = Terminal(100, 30)
        until(fd, terminal, lambda shown: shown.count("\nrollout ") >= 2 and "last step" in shown)
        labels = [line.split(" ")[0] for line in terminal.lines()]
        assert {"run", "nodes", "ranks", "last", "rollouts"} <= set(labels), terminal.lines()
        stopping = subprocess.Popen(
            [sys.executable, "-m", "miles_launcher.cli", "stop", "--run", str(run_dir)], env=environment(),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        until(fd, terminal, lambda shown: "everything has ended" in shown)
        until(fd, terminal, lambda shown: False)
        assert stopping.communicate(timeout=200)[0].count("has ended after") == 1
        assert stopping.returncode == 0
    finally:
        os.kill(pid, signal.SIGTERM)
        _, code = os.waitpid(pid, 0)
        os.close(fd)
    assert os.waitstatus_to_exitcode(code) == 143
    shown = "\n".join(terminal.lines())
    assert any("terminated by miles stop; everything has ended" in line for line in terminal.lines()[-3:])
    assert "\nrollouts" not in shown and "\nlast step" not in shown, "the view is gone"


def until(fd, terminal, fits):
    """Read what a program writes until the screen fits, or the program has ended."""
    while not fits("\n".join(terminal.lines())):
        try:
            data = os.read(fd, 1 << 16)
        except OSError:
            return
        if not data:
            return
        terminal.feed(data.decode(errors="ignore"))
