"""What rows of prompts have to hold: messages that templates can write, answers that supervised training can learn."""

import json
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.flags.prompt_facts import read_data
from miles.utils.prompt_columns import Columns

COLUMNS = Columns("prompt", "label", "metadata", "tools")


def test_messages_that_can_be_used():
    """Parts, and calls of tools without a text."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}, {"text": "b"}]
    row = {"prompt": [{"role": "user", "content": parts}, called, {"role": "tool", "content": "1"}], "label": "2"}
    assert COLUMNS.fault(row) is None
    assert COLUMNS.fault({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant"}], "label": "2"}) is None


LEARNT = replace(COLUMNS, is_learnt=True)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": CHAT}, None),
        ({"prompt": "a", "label": "b"}, None),
        ({"prompt": "a", "label": 3}, None),
        (
            {"prompt": CHAT[:1], "label": "b"},
            "'prompt'.*assistant's message to learn; it is a list with the roles user",
        ),
        ({"prompt": [CHAT[0], {**CHAT[1], "step_loss_mask": 0}]}, "'prompt'.*assistant's message to learn"),
        ({"prompt": "a"}, "'label'.*an answer to learn, which a text needs; it is not there"),
        ({"prompt": "a", "label": ""}, "an answer to learn"),
        ({"prompt": "a", "label": None}, "an answer to learn.*; it is null"),
        ({"prompt": "a", "label": ["b"]}, "an answer to learn"),
    ],
)
def test_what_supervised_training_learns_is_there(tmp_path, row, told):
    (tmp_path / "d.jsonl").write_text(f"{json.dumps({'prompt': CHAT, 'label': ''})}\n{json.dumps(row)}\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    for path, number in ((tmp_path / "d.jsonl", 2), (tmp_path / "d.parquet", 1)):
        broken = read_data(str(path), ["prompt"], [LEARNT]).broken
        assert (broken is None) == (told is None)
        if told is not None:
            assert broken[0] == number
            assert re.search(told, broken[1])
