"""Keys and passwords reach their tracker, and nothing else."""

import subprocess
import sys
from pathlib import Path

from miles.tracking.secrets import as_variables, for_people, split_argv, take_secrets, take_variables
from miles_launcher import train

KEY = "local-0123456789"


def test_the_key_is_taken_out_of_the_config():
    config, secrets = take_secrets({"wandb_key": KEY, "lr": 1})
    assert (config, secrets) == ({"wandb_key": None, "lr": 1}, {"wandb_key": KEY})
    assert take_secrets({"wandb_key": None}) == ({"wandb_key": None}, {})


def test_people_see_no_passwords():
    config = {
        "wandb_key": KEY, "mlflow_tracking_uri": "https://me:pw@h/x", "env": {"WANDB_API_KEY": KEY, "KEYS": "1"},
        "nested": [{"uri": "postgresql://me:pw@h/db", "db_password": "pw"}], "lr": 0.1, "none": None,
    }  # fmt: skip
    assert for_people(config) == {
        "wandb_key": "***", "mlflow_tracking_uri": "https://***@h/x", "env": {"WANDB_API_KEY": "***", "KEYS": "***"},
        "nested": [{"uri": "postgresql://***@h/db", "db_password": "***"}], "lr": 0.1, "none": None,
    }  # fmt: skip


def test_the_command_line_of_another_process_has_no_key():
    for argv in (["--a", "1", "--wandb-key", KEY, "--b"], ["--a", "1", f"--wandb-key={KEY}", "--b"]):
        words, found = split_argv(argv)
        assert words == ["--a", "1", "--b"]
        variables = as_variables(found)
        environment = {"HOME": "/", **variables}
        assert take_variables(environment) == [f"--wandb-key={KEY}"]
        assert environment == {"HOME": "/"}
    assert split_argv(["--wandb-key"]) == (["--wandb-key"], {})


def test_the_process_that_reads_the_flags_gets_it_nevertheless(tmp_path):
    seen = tmp_path / "seen"
    (tmp_path / "adder.py").write_text(
        "import pathlib, os\n"
        "async def generate(input): return input\n"
        "def add(parser):\n"
        f"    pathlib.Path({str(seen)!r}).write_bytes(pathlib.Path('/proc/self/cmdline').read_bytes())\n"
        "generate.add_arguments = add\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
         "from miles_launcher.train import resolve\n"
         f"words = ['--custom-generate-function-path', 'adder.generate', '--wandb-key', {KEY!r}]\n"
         "print([p.flag for p in resolve(words).problems])"],
        capture_output=True, text=True, timeout=100, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "--wandb-key" not in answer.stdout
    assert b"miles.flags" in seen.read_bytes()
    assert KEY.encode() not in seen.read_bytes()


def test_what_was_typed_is_covered(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from miles.tracking.secrets import cover_argument\n"
        "print(cover_argument(sys.argv[1]), cover_argument('abs' + 'ent'), sys.argv[1])\n"
        "print(pathlib.Path('/proc/self/cmdline').read_bytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, KEY, "--next"], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == f"True False {KEY}"
    assert KEY not in second
    assert "*" * len(KEY) in second
    assert "--next" in second


def test_there_is_nothing_to_cover_where_the_kernel_does_not_say_where_it_is(tmp_path):
    from miles.tracking.secrets import cover_argument

    (tmp_path / "stat").write_text("1 (x) " + " ".join(["0"] * 50))
    (tmp_path / "cmdline").write_bytes(b"a\0b\0")
    assert not cover_argument("b", proc=tmp_path)
    assert not cover_argument("b", proc=tmp_path / "absent")


def test_train_covers_what_it_was_given():
    source = Path(train.__file__).read_text()
    assert source.index("cover_argument(secret)") < source.index("resolve(arguments)")
