"""python train.py: help, problems, dry run, exit codes; the launcher's process loads no torch."""

import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.flag_cases import QWEN3
from support.procs import eventually_sync

from miles.flags.problems import ResolverFailed
from miles_launcher.train import resolve

ROOT = Path(__file__).parents[2]
BASE = "--hf-checkpoint m --prompt-data p.jsonl --rollout-batch-size 2 --rollout-max-response-len 8 --rm-type math"
BASE += " --actor-num-gpus-per-node 2 --device cpu"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(QWEN3))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "m" / name).touch()
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n' * 4)
    return tmp_path


def train(place, flags, **env):
    command = [sys.executable, ROOT / "train.py", *flags.split()]
    return subprocess.run(
        command, check=False, cwd=place, capture_output=True, text=True, timeout=90, env={**os.environ, **env}
    )


def test_help_is_grouped_quick_and_needs_nothing(place):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = train(place, "--help", COLUMNS="120")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # whatever else the machine does
    for word in ("cluster:", "optimizer:", "--rollout-batch-size N", "(default 1e-06)", "--sglang-*"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    "what", ["import miles_launcher.train", "import miles_launcher.train as t; t.main(['--help'])"]
)
def test_this_process_loads_no_torch(what):
    code = f"import sys; {what}; sys.stderr.write(repr(sorted({{'torch', 'numpy', 'sglang'}} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]"


def test_exit_codes_of_a_run_are_defined_once():
    sources = [path for name in ("launcher", "miles") for path in (ROOT / name).rglob("*.py")]
    assert [path.name for path in sources if re.search(r"^EXIT_\w+\b.* = ", path.read_text(), re.MULTILINE)] == [
        "exit_codes.py"
    ]


def test_all_problems_are_told_and_nothing_is_started(place):
    done = train(place, f"{BASE} --prompt-data none.jsonl --lr fast --use-indexer-replay --num-rolout 3")
    assert done.returncode == 2
    for line in (
        "--prompt-data none.jsonl: there is no data file none.jsonl",
        "--lr fast: is not a number",
        "--use-indexer-replay: refused: not built yet",
        "Did you mean --num-rollout?",
        "4 problems with the flags",
        "E-FLAG-001",
    ):
        assert line in done.stderr
    assert not (place / "runs").exists()


def test_user_code_that_raises_ends_it_with_the_traceback_first(place):
    (place / "mine.py").write_text("raise RuntimeError('no key')\n")
    done = train(place, f"{BASE} --rollout-function-path mine.rollout", PYTHONPATH=str(place))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "E-FLAG-003" in done.stderr


def test_a_dry_run_shows_everything_and_starts_nothing(place):
    flags = f"{BASE} --rollout-num-gpus 2 --train-backend fsdp --dry-run"
    done = train(place, f"{flags} --env MY_KEY=own-secret --env HF_HUB_OFFLINE=0", COLUMNS="160", HF_TOKEN="hub-secret")
    assert done.returncode == 0, done.stderr
    for word in (
        "trainer rank 0",
        "trainer rank 1",
        "engine 1",
        "router",
        "rollout manager",
        "rendezvous",
        "miles.backends.sglang_utils.launch_engine",
        "WORLD_SIZE=2",
        "MY_KEY=***",
        "HF_TOKEN",
    ):
        assert word in done.stdout
    command = next(line for line in done.stdout.splitlines() if "train.py --" in line)
    assert command.endswith(f"train.py {flags} --env 'MY_KEY=***' --env 'HF_HUB_OFFLINE=***'")
    assert "secret" not in done.stdout
    assert "HF_HUB_OFFLINE=1" not in done.stdout  # the engines' own value gives way to the user's
    assert not (place / "runs").exists()


def test_a_dry_run_shows_how_environments_differ_from_the_agents(place):
    flags = [*f"{BASE} --rollout-num-gpus 1 --dry-run".split(), "--train-env-vars", '{"GLOO_KEY": "secret"}']
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *flags], check=False, cwd=place, capture_output=True, text=True, timeout=90,
        env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "7", "TOKENIZERS_PARALLELISM": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = {title[:-1]: line for title, line in itertools.pairwise(lines) if title.endswith(":")}
    agent = shown["agent of node-0"]
    for word in ("OMP_NUM_THREADS=1", "TORCHDYNAMO_DISABLE=1", "GLOO_KEY=***"):
        assert word in agent
    assert "TOKENIZERS_PARALLELISM=false" in shown["rollout manager"]
    for name in ("rollout manager", "engine 0", "trainer rank 0"):
        assert "OMP_NUM_THREADS" not in shown[name], "as the agent's"
    assert shown["trainer rank 1"].split()[:3] == ["RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1"]
    assert "secret" not in done.stdout


def test_a_dry_run_shows_the_parts_of_an_engine_that_spans_hosts(place):
    flags = (
        f"{BASE} --hosts n[1-3] --num-gpus-per-node 2 --rollout-num-gpus 4 --rollout-num-gpus-per-engine 4 --dry-run"
    )
    done = train(place, flags, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = {title[:-1]: line for title, line in itertools.pairwise(lines) if title.endswith(":")}
    for rank, name in enumerate(("engine 0, part 0", "engine 0, part 1")):
        arguments = json.loads(shlex.split(shown[name])[-1])
        assert (arguments["nnodes"], arguments["node_rank"], arguments["tp_size"]) == (2, rank, 4)
        assert arguments["dist_init_addr"] == "n2:PORT"
    placed = [line.split() for line in lines if "engine 0, part" in line and "meeting" not in line]
    assert any("n3" in words for words in placed) and any("meeting" in line for line in lines)


def test_a_dry_run_of_what_cannot_be_is_told(place):
    done = train(place, f"{BASE} --global-batch-size 3 --dry-run")
    assert done.returncode == 2
    assert "four" in done.stderr or "no multiple" in done.stderr


class TestResolvingProcess:
    def with_module(self, tmp_path, monkeypatch, text):
        (tmp_path / "mine.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return ["--rollout-function-path", "mine.rollout"]

    def test_one_that_dies_is_told_with_what_it_wrote(self, tmp_path, monkeypatch):
        flags = self.with_module(
            tmp_path, monkeypatch, "import os, sys\nsys.stderr.write('bye now\\n')\nsys.stderr.flush()\nos._exit(9)\n"
        )
        with pytest.raises(ResolverFailed) as caught:
            resolve(flags)
        assert "exit code 9" in caught.value.evidence
        assert "bye now" in caught.value.evidence

    def test_one_that_hangs_is_ended(self, tmp_path, monkeypatch):
        pid = tmp_path / "pid"
        flags = self.with_module(
            tmp_path,
            monkeypatch,
            f"import os, pathlib, threading\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
            "threading.Event().wait()\n",
        )
        with pytest.raises(ResolverFailed, match="failed") as caught:
            resolve(flags, timeout_s=3.0)
        assert "did not answer in 3 s" in caught.value.evidence
        assert not Path(f"/proc/{pid.read_text()}").exists()

    def test_ctrl_c_while_flags_are_read_is_130_and_leaves_nobody(self, place):
        pid = place / "pid"
        (place / "mine.py").write_text(
            f"import os, pathlib, threading\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
            "threading.Event().wait()\n"
        )
        command = [sys.executable, ROOT / "train.py", *BASE.split(), "--rollout-function-path", "mine.rollout"]
        with subprocess.Popen(
            command,
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            eventually_sync(lambda: pid.exists() and pid.read_text())
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert process.wait(30) == 130
            assert process.stderr.read() == b""
        assert not Path(f"/proc/{pid.read_text()}").exists()


def test_user_code_is_found_where_the_command_is_given_and_beside_the_script(place):
    (place / "here").mkdir()
    (place / "here" / "mine_here.py").write_text("def rm(args, sample):\n    return 0.0\n")
    (place / "script").mkdir()
    (place / "script" / "mine_beside.py").write_text("def keep(args, samples):\n    return True\n")
    script = place / "script" / "run.py"
    script.write_text(
        "import sys, miles_launcher.train as train\n"
        "train.start = lambda config: print([entry for entry in sys.path if 'here' in entry]) or 0\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    flags = BASE.replace("--hf-checkpoint m --prompt-data p", "--hf-checkpoint ../m --prompt-data ../p")
    hooks = "--custom-rm-path mine_here.rm --dynamic-sampling-filter-path mine_beside.keep"
    command = [sys.executable, script, *flags.split(), *hooks.split()]
    done = subprocess.run(command, check=False, cwd=place / "here", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(place / "here") in done.stdout


class TestListing:
    def run(self, *words):
        command = [sys.executable, "-m", "miles_launcher.cli", "flags", *words]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    def test_why_one_is_refused(self):
        assert "refused: not built yet: models with" in self.run("--use-indexer-replay").stdout

    def test_as_json(self):
        rows = json.loads(self.run("--json", "eps-clip").stdout)
        assert {row["dest"]: row["status"] for row in rows} == {
            "eps_clip": "honoured",
            "eps_clip_high": "honoured",
            "eps_clip_c": "honoured",
        }

    def test_a_name_that_no_flag_has(self):
        done = self.run("rollout-batchsize")
        assert done.returncode == 1
        assert "did you mean --rollout-batch-size?" in done.stderr
