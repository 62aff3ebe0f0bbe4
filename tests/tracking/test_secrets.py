"""Keys and passwords reach their tracker, and nothing else."""

import subprocess
import sys
from pathlib import Path

from miles.flags.config_file import apply_config
from miles.flags.parse import parse
from miles.flags.passthrough import router_flags, sglang_flags
from miles.flags.table import table
from miles.tracking.secret_names import is_secret
from miles.tracking.secrets import (
    as_variables,
    for_people,
    shown_argv,
    split_argv,
    take_secrets,
    take_variables,
    without_credentials,
)
from miles_launcher import train

KEY = "local-0123456789"


def test_a_command_line_is_shown_as_it_was_given_but_for_secrets():
    plain = ["--lr", "1e-3", "--label-key", "answer", "--hosts=n[1-2]", "--flag", "--kwargs", '{"a": [1,  2]}', "{x"]
    assert shown_argv(plain) == plain
    covered = {
        "--wandb-key": KEY, "--sglang-api-key": KEY, "--env": f"A={KEY}", "--train-env-vars": f'{{"A": "{KEY}"}}',
        "--uri": f"https://me:{KEY}@h/x", "--kwargs": f'{{"n": 1, "api_key": "{KEY}"}}',
    }  # fmt: skip
    hidden = ["***", "***", "A=***", '{"A": "***"}', "https://***@h/x", '{"n": 1, "api_key": "***"}']
    pairs = list(zip(covered, hidden, strict=True))
    assert shown_argv([word for pair in covered.items() for word in pair]) == [word for pair in pairs for word in pair]
    assert shown_argv([f"{flag}={value}" for flag, value in covered.items()]) == [f"{a}={b}" for a, b in pairs]
    assert shown_argv(["--wandb-key", f"--{KEY}", "--train-env-vars", KEY]) == [
        "--wandb-key", "***", "--train-env-vars", "***",
    ]  # fmt: skip


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


def test_a_name_says_that_it_is_secret():
    secret = (
        "DB_PASS", "GH_PAT", "X_AUTH", "x-auth", "AWS_ACCESS_KEY_ID", "openai_api_key", "openaiApiKey", "HF_TOKEN",
        "PGPASSWORD", "MYSQL_PWD", "GITHUB_TOKENS", "OPENAI_API_KEY_2", "db_password", "Authorization", "authToken",
        "client_secret", "my_key", "KEY", "APIKEY", "GOOGLE_CREDENTIALS",
    )  # fmt: skip
    innocent = (
        "max_tokens", "tokenizer", "pass_rate", "label_key", "eval_input_key", "eos_token", "PWD", "OLDPWD_DIR",
        "bypass", "compass", "monkey", "author", "path", "key_path", "passes", "first_pass", "num_special_tokens",
        "primary_keys",
    )  # fmt: skip
    assert [name for name in secret if not is_secret(name, "x")] == []
    assert [name for name in innocent if is_secret(name, "x")] == []
    assert not is_secret("tokens", 512) and not is_secret("TOKENS", "512") and not is_secret("auth", True)
    assert is_secret("db_password", 1234)


def test_no_flag_but_those_that_hold_secrets_is_hidden():
    flags = table().extended(sglang_flags()).extended(router_flags())
    hidden = {dest for dest in flags.by_dest if is_secret(dest, "x")}
    assert hidden == {
        "wandb_key", "sglang_api_key", "sglang_admin_api_key", "sglang_ssl_keyfile_password", "router_oracle_password",
        "router_api_key", "router_control_plane_api_keys",
    }  # fmt: skip


def test_what_a_file_gives_to_user_code_is_hidden_by_its_name():
    config = {"openai_api_key": KEY, "max_tokens": 5, "pass_rate": 0.5, "label_key": "label", "judge": {"token": KEY}}
    assert for_people(config) == {**config, "openai_api_key": "***", "judge": {"token": "***"}}


def test_urls_have_no_secrets():
    for text, shown in (
        ("postgresql://me:p@ss@h/db", "postgresql://***@h/db"),
        ("http://h/x?a=1&token=S&b=2", "http://h/x?a=1&token=***&b=2"),
        ("https://h/x?api_key=S#end", "https://h/x?api_key=***#end"),
        ("https://s3/x?X-Amz-Signature=S;max_tokens=3", "https://s3/x?X-Amz-Signature=***;max_tokens=3"),
        ("a=http://me:pw@h,b=http://i/x@y", "a=http://***@h,b=http://i/x@y"),
        ("http://h/mail@home", "http://h/mail@home"),
    ):
        assert without_credentials(text) == shown


def test_the_terminal_shows_no_key_that_a_file_replaces():
    parsed = parse(["--wandb-key", "one" + KEY], table())
    apply_config(parsed, table(), {"wandb_key": "two" + KEY})
    apply_config(parsed, table(), {"wandb_key": ["three" + KEY]})
    assert any("--wandb-key *** is replaced by ***" in notice for notice in parsed.notices)
    assert len(parsed.problems) == 1
    assert KEY not in f"{parsed.notices}{[problem.lines() for problem in parsed.problems]}"


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
