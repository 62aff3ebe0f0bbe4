"""What `examples/arithmetic/prepare.py` makes is complete, keeps its sets apart, and grades right."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from miles.rollout.rm_hub.math_text import last_boxed

SCRIPT = Path(__file__).parents[2] / "examples" / "arithmetic" / "prepare.py"


def load():
    spec = importlib.util.spec_from_file_location("arithmetic_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums")
    prepare.prepare(path, sft_conversations=2000)
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(message):
    left, right = message["content"].removesuffix("=?").split("+")
    return int(left), int(right)


def digests(path):
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob("*.*")}


def test_the_directory_is_complete_and_the_same_for_the_same_seed(made, tmp_path):
    prepare.prepare(tmp_path, sft_conversations=2000)
    found = digests(made)
    assert found == digests(tmp_path)
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert set(found) == {"sft.jsonl", "train.jsonl", "heldout.jsonl", *(f"model/{file}" for file in files)}


def test_held_out_sums_are_nowhere_else_not_even_turned_around(made):
    held = {frozenset(numbers(row["prompt"][0])) for row in rows(made / "heldout.jsonl")}
    train = {numbers(row["prompt"][0]) for row in rows(made / "train.jsonl")}
    taught = {numbers(row["messages"][0]) for row in rows(made / "sft.jsonl")}
    assert len(held) == len(rows(made / "heldout.jsonl")) == prepare.HELD_OUT_PAIRS
    assert not held & {frozenset(pair) for pair in train | taught}
    assert taught <= train
    assert len(train) == len(rows(made / "train.jsonl")) > 7000


def test_answers_grade_as_they_should(made):
    for row in rows(made / "train.jsonl"):
        left, right = pair = numbers(row["prompt"][0])
        assert row["label"] == str(left + right)
        assert boxed(prepare.working(pair)) == row["label"]
        assert int(boxed(prepare.guess(pair))) == (left + right + 5) // 10 * 10
    assert prepare.working((47, 38)) == "7+8=15 4+3+1=8 \\boxed{85}"
    assert prepare.working((12, 30)) == "2+0=2 1+3=4 \\boxed{42}"


def test_about_a_third_of_the_warm_up_works_sums_out(made):
    answers = [row["messages"][1]["content"] for row in rows(made / "sft.jsonl")]
    worked = sum("=" in answer for answer in answers) / len(answers)
    assert worked == pytest.approx(1 - prepare.GUESSES, abs=0.04)


def test_digits_and_words_are_single_tokens_and_any_text_comes_back(made):
    tokenizer = Tokenizer.from_file(str(made / "model" / "tokenizer.json"))
    text = "<|im_start|>user\n47+38=?<|im_end|>\n<|im_start|>assistant\n\\boxed{85}<|im_end|>\n"
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    assert tokens[:5] == ["<|im_start|>", "user", "Ċ", "4", "7"]
    assert tokens[-6:] == ["\\boxed{", "8", "5", "}", "<|im_end|>", "Ċ"]
    for other in (text, "Any text: Ünïcode 漢字, users\tand \\boxed{\n"):
        ids = tokenizer.encode(other, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == other
        assert max(ids) < prepare.VOCAB


def test_weights_are_those_of_the_configuration(made):
    config = json.loads((made / "model" / "config.json").read_text())
    with safe_open(made / "model" / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == dict(prepare.weight_shapes(config))


def boxed(answer):
    return last_boxed(answer)
