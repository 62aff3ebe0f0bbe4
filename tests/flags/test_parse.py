"""From words to values: conversions, repeated flags, everything that cannot be understood at once."""

import pytest
from support.flag_cases import problems

from miles.flags.flag import Flag
from miles.flags.parse import convert, parse
from miles.flags.table import table


def typed(*words):
    parsed = parse(words, table())
    assert parsed.problems == []
    return parsed.typed


def complaints(*words):
    return {problem.flag: problem for problem in parse(words, table()).problems}


def test_only_what_was_typed_is_there():
    assert typed("--lr", "2e-6", "--colocate") == {"lr": 2e-6, "colocate": True}


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        (["--rollout-top-k", "-1"], "rollout_top_k", -1),
        (["--kl-loss-coef", "1e-3"], "kl_loss_coef", 0.001),
        (["--entropy-coef", "-1e-3"], "entropy_coef", -0.001),
        (["--entropy-coef=-1e-3"], "entropy_coef", -0.001),
        (["--no-check-for-nan-in-loss-and-grad"], "check_for_nan_in_loss_and_grad", False),
        (["--offload-train"], "offload_train", True),
        (["--no-offload-train"], "offload_train", False),
        (["--disable-bias-linear"], "add_bias_linear", False),
        (["--norm-epsilon", "1e-6"], "layernorm_epsilon", 1e-6),
        (["--rotary-base", "1000000"], "rotary_base", 1e6),
        (["--rollout-stop", "a", "b"], "rollout_stop", ["a", "b"]),
        (["--rollout-stop-token-ids", "1", "2"], "rollout_stop_token_ids", [1, 2]),
        (["--train-env-vars", '{"A": "1"}'], "train_env_vars", {"A": "1"}),
        (["--env", "A=1", "--env", "B=x=y"], "env", ["A=1", "B=x=y"]),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
        (["--persistent-save-interval", "5"], "save_interval", 5),
    ],
)
def test_values(words, dest, value):
    assert typed(*words) == {dest: value}


def test_a_value_is_told_from_the_spelling_that_was_used():
    parsed = parse(["--persistent-save-interval", "5"], table())
    assert parsed.spelled == {"save_interval": "--persistent-save-interval"}


def test_everything_wrong_is_told_at_once():
    found = complaints(
        "--lr", "x", "--rollout-batch-size", "1.5", "--optimizer", "lion", "--allgather-cp", "--num-rolout", "3"
    )
    assert set(found) == {"--lr", "--rollout-batch-size", "--optimizer", "--allgather-cp", "--num-rolout"}
    assert found["--lr"].value == "x"
    assert found["--optimizer"].allowed == "adam or sgd"
    assert "context parallel" in found["--allgather-cp"].what
    assert found["--num-rolout"].allowed == "--num-rollout"


def test_abbreviations_are_unknown():
    assert complaints("--rollout-batch", "4")["--rollout-batch"].what == "there is no such flag"


def test_a_stray_word_is_told():
    assert "belongs to no flag" in complaints("--colocate", "yes")["yes"].what


def test_a_missing_value_is_told_by_name():
    assert "expected one argument" in complaints("--lr", "--colocate")["--lr"].what


def test_what_argparse_gives_up_at_hides_nothing():
    """Each is told with what helps, the rest is read, and other problems are told too."""
    words = [
        "--colocate=false",
        "--lr",
        "2e-6",
        "--offload-train=false",
        "--rollout-stop",
        "-x",
        "--seed",
        "--optimizer",
        "lion",
    ]
    parsed = parse(words, table())
    found = {problem.flag: problem for problem in parsed.problems}
    assert (parsed.typed["lr"], set(found)) == (
        2e-6, {"--colocate", "--offload-train", "--rollout-stop", "--seed", "--optimizer"},
    )  # fmt: skip
    assert (found["--colocate"].value, found["--colocate"].what) == ("false", "takes no value")
    assert "Leave out =false" in found["--colocate"].advice
    assert "--no-offload-train" in found["--offload-train"].advice
    assert "--rollout-stop=-x" in found["--rollout-stop"].advice
    assert "right after it" in found["--seed"].advice


def test_what_cannot_be_read_is_not_missing():
    assert set(problems("--colocate=false --prompt-data", without=["--prompt-data", "--colocate"])) == {
        "--colocate", "--prompt-data",
    }  # fmt: skip


def test_a_flag_of_user_code_that_cannot_be_read_hides_nothing():
    def add_arguments(parser):
        parser.add_argument("--mine", type=int)

    parsed = parse(["--mine", "x", "--lr", "1", "--seed", "y"], table(), [add_arguments])
    assert parsed.typed["lr"] == 1
    assert [problem.flag for problem in parsed.problems] == ["--mine", "--seed"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lerning-rate 3 --seed 1 grp0 extra", {"--lerning-rate", "grp0", "extra"}),
        ("--rolout-batch-size 3 extra", {"--rolout-batch-size", "extra"}),
        ("--colocat yes", {"--colocat", "yes"}),
        ("--rolout-stop a b", {"--rolout-stop"}),
        ("--rolout-batch-size=3 3", {"--rolout-batch-size", "3"}),
        ("--seed 3 --rolout-batch-size 3", {"--rolout-batch-size"}),
    ],
)
def test_words_after_an_unknown_flag(words, told):
    assert set(complaints(*words.split())) == told


def test_a_variable_that_is_none_is_a_problem_and_no_crash():
    assert set(problems("--env A --env B=1")) == {"--env"}


def test_a_refused_value_names_what_is_taken():
    found = complaints("--moe-token-dispatcher-type", "flex")["--moe-token-dispatcher-type"]
    assert found.allowed == "alltoall"
    assert "differ in length" in found.what


@pytest.mark.parametrize("word", ["", "NAME", "=x", "1A=x"])
def test_env_wants_key_and_value(word):
    assert "--env" in complaints("--env", word)


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        ("count", "4096", 4096),
        ("count", "1k", 1000),
        ("count", "25.6k", 25600),
        ("count", "1Ki", 1024),
        ("count", "2Mi", 2 << 20),
        ("yesno", "True", True),
        ("yesno", "no", False),
        ("int", 3.0, 3),
        ("int", "1_000", 1000),
        ("json", [1], [1]),
        ("json", "[1]", [1]),
    ],
)
def test_conversions(kind, word, value):
    assert convert(Flag(("--x",), "x", kind), word) == value


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("count", "1KB"),
        ("yesno", "maybe"),
        ("int", "1.0"),
        ("int", True),
        ("int", None),
        ("float", "nan"),
        ("float", True),
        ("float", None),
        ("json", "{"),
        ("path", ""),
        ("switch", "perhaps"),
    ],
)
def test_what_is_not_of_the_kind(kind, word):
    with pytest.raises(ValueError, match="is "):
        convert(Flag(("--x",), "x", kind), word)


def test_user_code_adds_flags_to_a_real_parser():
    def add(parser):
        parser.add_argument("--max-turns", type=int, default=4)
        parser.add_argument("--judge", choices=["a", "b"], default="a")

    parsed = parse(["--judge", "b", "--colocate"], table(), [add])
    assert parsed.extra == {"max_turns": 4, "judge": "b"}
    assert parsed.typed == {"colocate": True}
    assert "invalid int value" in parse(["--max-turns", "x"], table(), [add]).problems[0].what


def test_a_flag_of_user_code_that_exists_is_told():
    parsed = parse([], table(), [lambda parser: parser.add_argument("--lr")])
    assert "conflicting" in parsed.problems[0].what


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--generate-max-turns", "it is a flag of --custom-generate-function-path miles"),
        ("--custom-agent-function-path", "miles.rollout.generate_hub.agentic_tool_call"),
        ("--eval-sglang-context-length", "engines for evaluation only"),
    ],
)
def test_flags_that_functions_of_the_reference_add_are_refused_by_name(flag, why):
    assert why in complaints(flag, "4")[flag].what


def test_a_function_that_adds_one_of_those_has_it():
    add = lambda parser: parser.add_argument("--generate-max-turns", type=int)  # noqa: E731
    assert parse(["--generate-max-turns", "4"], table(), [add]).extra == {"generate_max_turns": 4}


def test_the_beginning_of_one_name_is_taken_for_it():
    assert table().nearest("--rollout-temp") == "--rollout-temperature"
    assert table().nearest("--rollout-batchsize") == "--rollout-batch-size"
    assert table().nearest("--xyzzy") is None
