"""python -m miles.flags: argv in, JSON out, whatever user code does."""

import json
import os
import subprocess
import sys

import pytest
from support.flag_cases import QWEN3

BASE = "--hf-checkpoint m --prompt-data p.jsonl --rollout-batch-size 2 --rollout-max-response-len 8 --rm-type math"
BASE += " --actor-num-gpus-per-node 1 --colocate --device cpu"


@pytest.fixture
def place(tmp_path):
    """A working directory with a model directory and prompts."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(QWEN3))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "m" / name).touch()
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n' * 4)
    return tmp_path


def ask(place, flags, **env):
    command = [sys.executable, "-m", "miles.flags", *flags.split()]
    done = subprocess.run(
        command, check=True, cwd=place, capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )
    return json.loads(done.stdout)


def test_a_config(place):
    answer = ask(place, BASE)
    assert set(answer) == {"config", "notices"}
    assert answer["config"]["num_rollout"] == 2
    assert answer["config"]["hf_checkpoint"] == str(place / "m")
    assert answer["config"]["run_dir"].startswith(str(place / "runs"))


def test_problems(place):
    answer = ask(place, f"{BASE} --prompt-data q.jsonl --allgather-cp")
    assert {problem["flag"] for problem in answer["problems"]} == {"--prompt-data", "--allgather-cp"}
    assert "config" not in answer


def test_user_code_adds_flags_and_may_print(place):
    (place / "mine.py").write_text(
        "print('loading')\n"
        "async def generate(input): ...\n"
        "def add(parser):\n"
        "    print('adding')\n"
        "    parser.add_argument('--judge-url', default='none')\n"
        "generate.add_arguments = add\n"
    )
    flags = f"{BASE} --custom-generate-function-path mine.generate"
    assert ask(place, flags)["config"]["judge_url"] == "none"
    assert ask(place, f"{flags} --judge-url http://x")["config"]["judge_url"] == "http://x"


def test_user_code_that_raises_is_told_with_its_traceback_first(place):
    (place / "mine.py").write_text("def helper():\n    raise RuntimeError('no key')\nhelper()\n")
    error = ask(place, f"{BASE} --rollout-function-path mine.rollout")["error"]
    assert error["text"].startswith("Traceback")
    assert "RuntimeError: no key" in error["text"]
    assert (error["code"], error["exit_code"]) == ("E-FLAG-003", 1)


def test_add_arguments_that_raises_is_told(place):
    (place / "mine.py").write_text("def generate(): ...\ngenerate.add_arguments = lambda parser: 1 / 0\n")
    assert "ZeroDivisionError" in ask(place, f"{BASE} --custom-generate-function-path mine.generate")["error"]["text"]


def test_a_config_file_is_applied_before_anything_is_derived(place):
    (place / "c.yaml").write_text("rollout_batch_size: 4\nmy_own: 7\n")
    found = ask(place, f"{BASE} --custom-config-path c.yaml")["config"]
    assert (found["rollout_batch_size"], found["global_batch_size"], found["num_rollout"]) == (4, 4, 1)
    assert found["my_own"] == 7


def test_a_config_file_that_is_missing_is_told(place):
    answer = ask(place, f"{BASE} --custom-config-path none.yaml")
    assert [problem["flag"] for problem in answer["problems"]] == ["--custom-config-path"]


def test_it_loads_no_torch(place):
    code = (
        "import sys; from miles.flags.__main__ import answer\n"
        "found = answer(sys.argv[1:]); assert 'config' in found, found\n"
        "print(sorted({'torch', 'numpy', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *BASE.split()]
    done = subprocess.run(command, check=True, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_reference_systems_entry_works_in_a_program_of_the_users(place):
    code = (
        "from miles.utils.arguments import parse_args\n"
        "args = parse_args(lambda parser: parser.add_argument('--mine', type=int))\n"
        "print(args.mine, args.num_rollout)"
    )
    command = [sys.executable, "-c", code, *BASE.split(), "--mine", "5"]
    done = subprocess.run(command, check=True, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout == "5 2\n"
    done = subprocess.run([*command, "--lr", "x"], check=False, cwd=place, capture_output=True, text=True, timeout=60)
    assert "FlagProblems: 1 problem with the flags: --lr" in done.stderr
