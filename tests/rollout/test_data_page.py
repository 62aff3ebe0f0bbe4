"""docs/data.md: its examples are read, its errors are those that are told, its tables are whole."""

import gzip
import json
import re
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.chat_templates import QWEN
from support.rollout_cases import make_args
from support.tiny_models import tiny_model

from miles.flags.entry import resolve_argv
from miles.flags.table import table
from miles.utils.data import Dataset
from miles.utils.eval_config import EvalDatasetConfig, eval_datasets
from miles.utils.mask_utils import KINDS, MultiTurnLossMaskGenerator
from miles.utils.processing_utils import load_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
GOOD = b'{"prompt": "a", "label": "b"}\n'


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def rows_of(title):
    """The cells of the table below a heading."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines() if line.startswith("|")][2:]  # fmt: skip


def test_the_rows_of_the_page_can_be_read(tmp_path):
    (tmp_path / "d.jsonl").write_text(blocks("json")[0])
    data = Dataset(str(tmp_path / "d.jsonl"), None, None, None, prompt_key="prompt", tool_key="tools")
    assert len(data) == 3
    assert data[2].metadata["tools"][0]["function"]["name"] == "add"


def test_the_conversation_of_the_page_is_learnt_as_it_says(tmp_path):
    (tmp_path / "t.jinja").write_text(QWEN)
    masks = MultiTurnLossMaskGenerator(load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja")))
    tokens, mask = masks.get_loss_mask(json.loads(blocks("json")[1])["prompt"])
    assert masks.get_text_from_loss_mask(tokens, mask) == ["4<|im_end|>"]
    assert [row[0].strip("`") for row in rows_of("Supervised training")] == list(KINDS)


def test_the_evaluation_of_the_page_is_read(tmp_path):
    (tmp_path / "e.yaml").write_text(blocks("yaml")[0])
    aime, gpqa = eval_datasets(make_args(eval_config=str(tmp_path / "e.yaml")))
    assert (aime.n_samples_per_eval_prompt, aime.temperature, aime.max_response_len) == (4, 0.6, 16384)
    assert (gpqa.path, gpqa.rm_type, gpqa.metadata_overrides) == ("gpqa.parquet@[:200]", "gpqa", {"choices": 4})
    assert yaml.safe_load(blocks("yaml")[0])["eval"]["datasets"][1]["apply_chat_template"] is True


def test_every_setting_of_an_evaluation_is_on_the_page():
    named = {name for row in rows_of("Evaluations") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {field.name for field in fields(EvalDatasetConfig)}


def test_every_flag_on_the_page_is_honoured():
    flags = {flag.name: flag.status for flag in table().flags}
    named = set(re.findall(r"`(--[a-z-]*[a-z])[ `]", PAGE))
    assert len(named) > 30
    assert {name: flags.get(name) for name in named if flags.get(name) != "honoured"} == {}


def broken(directory):
    """A file for each row of the table, in its order."""
    table_ = pa.table({"prompt": ["a"] * 100, "label": ["b"] * 100})
    pq.write_table(table_, directory / "whole.parquet")
    contents = [
        GOOD * 2 + b'{"prompt": "a", "lab\n',
        GOOD * 2 + b"[1]\n",
        GOOD + b'{"prompt": "caf\xe9", "label": "b"}\n',
        GOOD + b'{"prompt": 7, "label": "b"}\n',
        GOOD + b'{"prompt": [{"role": "user"}], "label": "b"}\n',
        GOOD + b'{"prompt": [{"role": "user", "content": "a"}]}\n',
        GOOD + b'{"prompt": "a", "label": "b", "metadata": "x"}\n',
        GOOD * 2 + b'{"prompt": "a"}\n',
        gzip.compress(GOOD),
        b"[" + GOOD + b"]",
        (directory / "whole.parquet").read_bytes()[:-50],
        b"",
    ]
    for i, content in enumerate(contents):
        (directory / f"{i}.jsonl").write_bytes(content)
        yield str(directory / f"{i}.jsonl")
    (directory / "short.jsonl").write_bytes(GOOD)
    yield f"{directory}/short.jsonl@[100:]"
    yield str(directory)


def test_what_is_refused_is_told_as_the_page_says(tmp_path):
    cases = rows_of("What is refused, and how it is told")
    paths = list(broken(tmp_path))
    assert len(cases) == len(paths)
    for (what, told), path in zip(cases, paths, strict=True):
        supervised = ["--loss-type", "sft_loss"] if "sft_loss" in what else []
        problems = resolve_argv(["--prompt-data", path, "--rm-type", "math", *supervised]).problems
        text = "\n".join(str(vars(p)) if hasattr(p, "__dict__") else str(p) for p in problems)
        for part in re.findall(r"`(.*?)`", told):
            assert part.replace("'", "") in text.replace("\\'", "").replace("'", ""), (what, text)


@pytest.mark.parametrize("name", ["hooks.md", "errors.md"])
def test_pages_that_it_names_are_there(name):
    assert f"({name})" in PAGE
