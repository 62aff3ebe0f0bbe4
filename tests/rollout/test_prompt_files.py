"""Files of prompts, good and bad: what is read, what is told about the first line that cannot be, and what it costs."""

import gzip
import json
import os
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rollout_cases import make_args, write_jsonl
from support.tiny_models import tiny_model

from miles.flags.prompt_facts import DataFacts, read_data
from miles.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from miles.utils.data import BrokenRow, DataChanged, Dataset, EmptyDataset, NoDataset, parse_path
from miles.utils.processing_utils import load_tokenizer, shared_tokenizer
from miles.utils.prompt_columns import Columns, without_nulls

COLUMNS = Columns("prompt", "label", "metadata", "tools")
GOOD = b'{"prompt": "1+1=", "label": "2"}\n'


def look(path, columns=COLUMNS):
    return read_data(str(path), [columns.prompt, columns.label or ""], [columns])


def prompts(data):
    return [sample.prompt for sample in data.samples]


def dataset(path, **values):
    return Dataset(str(path), None, None, None, **{"prompt_key": "prompt", "label_key": "label", **values})


# -- lines ---------------------------------------------------------------------------------------------------

BROKEN = [
    (b'{"prompt": "1+1=", "lab\n', "Unterminated string"),
    (b'{"prompt": "1+1=" "label": "2"}\n', "Expecting ',' delimiter"),
    (b"[1, 2]\n", r"it is a list, not an object: \[1, 2\]"),
    (b'"text"\n', "it is a text, not an object"),
    (b"null\n", "it is null, not an object"),
    (b'{"prompt": "caf\xe9", "label": "2"}\n', "byte 16 of it, 0xe9, is no UTF-8"),
    (b'{"prompt": "\\ud83d", "label": "2"}\n', "half of a character"),
    (b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n", "nested too deeply"),
    (b"\x00\x00\x00\n", "Expecting value"),
    (b'{"prompt": 7, "label": "2"}\n', "column 'prompt'.* is not text or a list of messages.* it is a int: 7"),
    (b'{"prompt": null, "label": "2"}\n', "is not text or a list of messages.* it is null"),
    (b'{"prompt": [], "label": "2"}\n', r"a list of messages with roles.* it is a list: \[\]"),
    (b'{"prompt": [{"content": "a"}], "label": "2"}\n', "a list of messages with roles"),
    (
        b'{"prompt": [{"role": 5, "content": "a"}], "label": "2"}\n',
        "whose roles are text.* a message 1 whose role is a int",
    ),
    (
        b'{"prompt": [{"role": "system", "content": "a"}, {"role": "user"}], "label": "2"}\n',
        "messages with contents.* message 2 of role 'user' without content",
    ),
    (b'{"prompt": [{"role": "user", "content": null}], "label": "2"}\n', "message 1 of role 'user' without content"),
    (
        b'{"prompt": [{"role": "user", "content": ["a"]}], "label": "2"}\n',
        r"whose contents are text, lists of parts or null.* whose content is a list: \['a'\]",
    ),
    (b'{"prompt": [{"role": "user", "content": 7}], "label": "2"}\n', "message 1 whose content is a int: 7"),
    (b'{"prompt": "a", "label": "2", "metadata": "x"}\n', "column 'metadata'.* is not an object.* it is a str: x"),
    (b'{"prompt": "a", "label": "2", "metadata": [1]}\n', r"it is a list: \[1\]"),
    (b'{"prompt": "a", "label": "2", "tools": "add"}\n', "column 'tools'.* is not a list of tools"),
    (b'{"prompt": "a", "label": "2", "tools": [1]}\n', r"is not a list of tools.* it is a list: \[1\]"),
]


@pytest.mark.parametrize(("line", "told"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_broken_line_is_told_with_its_number_by_flags_and_by_the_loader(tmp_path, line, told):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD * 6 + b"\n  \r\n" + line + GOOD)
    number, why = look(path).broken
    assert number == 9
    assert re.search(told, why)
    assert len(why) < 500
    with pytest.raises(BrokenRow, match=r"d\.jsonl, line 9") as caught:
        dataset(path, tool_key="tools")
    assert re.search(told, f"{caught.value.what} {caught.value.evidence}")


def test_a_missing_column_is_told_with_its_line_and_the_rest_of_the_row_is_looked_at(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "label": 1}, {"prompt": "b"}, {"q": "c", "label": 1}])
    assert look(path) == DataFacts(rows=3, columns=("prompt", "label"), absent={"label": 2, "prompt": 3})
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "label": 1}, {"prompt": "b", "metadata": 3}])
    assert look(path).broken[0] == 2


GOOD_FILES = {
    "byte order mark": b"\xef\xbb\xbf" + GOOD * 2,
    "windows lines": GOOD.replace(b"\n", b"\r\n") * 2,
    "blank lines": b"\n" + GOOD + b"  \n\t\n" + GOOD + b"\n\n",
    "no last line break": GOOD + GOOD.rstrip(),
    "numbers beyond the standard": b'{"prompt": "1+1=", "label": 12345678901234567890123, "metadata": {"x": NaN}}\n'
    * 2,
    "empty metadata": b'{"prompt": "1+1=", "label": null, "metadata": null, "tools": null}\n' * 2,
    "tools as text": b'{"prompt": "1+1=", "label": null, "tools": "[]"}\n' * 2,
    "line separators inside": '{"prompt": "1+1=", "label": "a\u2028b\x0cc"}\n'.encode() * 2,
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_is_unusual_and_readable_is_read(tmp_path, name):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD_FILES[name].replace(b"\x0c", b"\\f"))
    assert (look(path).rows, look(path).broken, look(path).error) == (2, None, "")
    assert prompts(dataset(path)) == ["1+1="] * 2
    assert look(f"{path}@[1:]").rows == len(dataset(f"{path}@[1:]")) == 1


def other_files(directory):
    """Of other kinds, and what is told of each."""
    (directory / "gone.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (directory / "packed.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + GOOD)
    (directory / "wide.jsonl").write_bytes(GOOD.decode().encode("utf-16"))
    (directory / "list.json").write_bytes(b"[\n" + GOOD.rstrip() + b"]\n")
    (directory / "text.parquet").write_bytes(GOOD)
    os.mkfifo(directory / "pipe.jsonl")
    return {
        "gone.jsonl.gz": "is compressed.*gzip.*gunzip -k",
        "packed.jsonl": "is compressed.*zstandard.*unzstd",
        "wide.jsonl": "is text in UTF-16.*iconv",
        "list.json": "holds a list, not a row in each line.*jq -c",
        "text.parquet": "is no Parquet file.*must not be named .parquet",
        "pipe.jsonl": "is no ordinary file.*cannot be read twice",
        "nothing.jsonl": "there is no data file.*has: gone.jsonl.gz, list.json",
        "": "is a directory, not a file.*list.json",
        "list.json@[x:2]": "does not end in rows of a file.*invalid literal.*PATH@\\[a:b\\]",
        "list.json@[1:2:3]": "does not end in rows of a file",
    }


def test_other_files_are_told_apart_and_what_to_do(tmp_path):
    for name, told in other_files(tmp_path).items():
        facts = look(tmp_path / name) if name else look(tmp_path)
        assert re.search(f"(?s){told}", f"{facts.error}\n{facts.advice}"), facts
        with pytest.raises(NoDataset, match=f"(?s){told}"):
            dataset(tmp_path / name)


def test_an_empty_file_and_an_empty_slice(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"")
    assert look(tmp_path / "d.jsonl") == DataFacts()
    with pytest.raises(EmptyDataset, match="is empty"):
        dataset(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_bytes(GOOD * 3)
    with pytest.raises(EmptyDataset, match="has no rows"):
        dataset(f"{tmp_path}/d.jsonl@[3:]")


# -- slices --------------------------------------------------------------------------------------------------

SLICES = [
    "[:]",
    "[2:]",
    "[:3]",
    "[-3:]",
    "[:-3]",
    "[-4:-1]",
    "[1:-1]",
    "[-3:6]",
    "[5:100]",
    "[-100:2]",
    "[4:2]",
    "[9:]",
]


@pytest.mark.parametrize("part", SLICES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_slices_are_those_of_lists(tmp_path, part, kind):
    rows = [{"prompt": f"p{i}", "label": str(i)} for i in range(8)]
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join("\n" * (i % 2) + json.dumps(row) for i, row in enumerate(rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    start, stop = (int(end) if end else None for end in part[1:-1].split(":"))
    wanted = [row["prompt"] for row in rows[start:stop]]
    assert look(f"{path}@{part}").rows == len(wanted)
    if wanted:
        assert prompts(dataset(f"{path}@{part}")) == wanted
    else:
        with pytest.raises(EmptyDataset):
            dataset(f"{path}@{part}")


def test_a_path_without_a_slice_is_whole():
    assert parse_path("a@b.jsonl") == ("a@b.jsonl", None)
    assert parse_path("a.jsonl@[1:2]") == ("a.jsonl", slice(1, 2))
    assert parse_path("a.jsonl@[:-2]") == ("a.jsonl", slice(None, -2))


def test_what_lies_outside_a_slice_may_be_broken(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"{broken\n" + GOOD * 2 + b"{broken\n")
    assert look(f"{tmp_path}/d.jsonl@[1:3]").rows == len(dataset(f"{tmp_path}/d.jsonl@[1:3]")) == 2
    assert look(f"{tmp_path}/d.jsonl@[-2:]").broken[0] == 4


# -- Parquet -------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}]
OTHER_TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"text": {"type": "string"}}}}]


def test_parquet_rows_are_those_of_jsonl(tmp_path):
    """A column of objects has the keys of all rows in each: those that are null were not there."""
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "label": "1", "tools": TOOLS, "metadata": {"level": 1}},
        {"prompt": [{"role": "user", "content": "b", "name": "me"}], "label": "2", "tools": OTHER_TOOLS,
         "metadata": {"level": 2}},
        {"prompt": [{"role": "user", "content": "c"}], "label": "3", "tools": None, "metadata": None},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=2)
    write_jsonl(tmp_path / "d.jsonl", rows)
    one, other = (dataset(tmp_path / f"d.{kind}", tool_key="tools") for kind in ("parquet", "jsonl"))
    assert [s.to_dict() for s in one.samples] == [s.to_dict() for s in other.samples]
    assert [s.to_dict() for s in one.copies(1, 2)] == [other[1].to_dict()] * 2
    assert one[0].metadata["tools"] == TOOLS
    assert look(tmp_path / "d.parquet").rows == 3
    assert without_nulls({"a": [None, {"b": None}]}) == {"a": [None, {}]}


def test_a_parquet_file_needs_no_name(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "label": [2.5]}), tmp_path / "rows")
    [sample] = dataset(tmp_path / "rows").samples
    assert (sample.prompt, sample.label) == ("a", "2.5")


@pytest.mark.parametrize(
    ("table", "told", "row"),
    [
        ({"prompt": ["a", "b", None], "label": ["1", "2", "3"]}, "column 'prompt'.*it is null", 3),
        ({"prompt": [1, 2], "label": ["1", "2"]}, "is not text or a list of messages", 1),
        (
            {"prompt": [[{"role": "user", "content": "x"}], [{"content": "x"}]], "label": ["1", "2"]},
            "messages with roles",
            2,
        ),
        ({"prompt": ["a"], "label": ["1"], "metadata": ["{}"]}, "column 'metadata'", 1),
        ({"prompt": ["a", "b"], "label": ["1", "2"], "tools": ["[]", "x"]}, "column 'tools'", 2),
    ],
)
def test_a_broken_row_of_parquet_is_told_with_its_number(tmp_path, table, told, row):
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    facts = look(tmp_path / "d.parquet")
    assert (facts.broken[0], facts.unit) == (row, "row")
    assert re.search(told, facts.broken[1])
    with pytest.raises(BrokenRow, match=f"row {row}"):
        dataset(tmp_path / "d.parquet", tool_key="tools")


@pytest.mark.parametrize("cut", ["end", "middle"])
def test_a_parquet_file_that_is_cut_off_or_damaged(tmp_path, cut):
    path = tmp_path / "d.parquet"
    table = pa.table({"prompt": [os.urandom(50).hex() for _ in range(2000)], "label": ["1"] * 2000})
    pq.write_table(table, path, row_group_size=500, use_dictionary=False)
    data = path.read_bytes()
    where = len(data) // 2
    path.write_bytes(data[:where] if cut == "end" else data[:where] + b"\xff" * 20000 + data[where + 20000 :])
    facts = look(path)
    assert (facts.broken[0], "cut off or damaged" in facts.broken[1]) == (0, True)
    with pytest.raises(BrokenRow, match="cannot be read"):
        dataset(path)


def test_a_parquet_file_that_lacks_a_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"question": ["a"], "answer": ["1"]}), tmp_path / "d.parquet")
    facts = look(tmp_path / "d.parquet")
    assert (facts.columns, facts.absent) == (("question", "answer"), {"prompt": 1, "label": 1})
    with pytest.raises(Exception, match=r"no column 'prompt', which --input-key names\n.*'question', 'answer'"):
        dataset(tmp_path / "d.parquet")


# -- samples made when they are asked for --------------------------------------------------------------------


def numbered(tmp_path, count=5):
    return write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "label": i, "metadata": {"n": [i]}}
                                              for i in range(count)])  # fmt: skip


def test_samples_that_were_taken_out_stay_and_copies_share_nothing(tmp_path):
    data = dataset(numbered(tmp_path))
    assert data[1] is data.samples[1] is data.origin_samples[1]
    data.samples[1].metadata["mine"] = True
    data.shuffle(3)
    assert data.origin_samples[1].metadata["mine"]
    place = prompts(data).index("p1")
    one, other = data.copies(place, 2)
    assert one.metadata == other.metadata == {"n": [1], "mine": True}
    one.metadata["n"].append(2)
    assert other.metadata["n"] == data.samples[place].metadata["n"] == [1]
    assert len(data.samples[1:3]) == 2
    assert data.samples[-1] is data[len(data) - 1]


def test_the_users_own_list_takes_the_place_of_the_samples(tmp_path):
    source = RolloutDataSource(make_args(prompt_data=numbered(tmp_path), rollout_shuffle=True))
    source.dataset.origin_samples = [s for s in source.dataset.origin_samples if s.prompt != "p2"]
    source.dataset.shuffle(1)
    assert sorted(prompts(source.dataset)) == ["p0", "p1", "p3", "p4"]
    assert len({g[0].prompt for g in source.get_samples(4)}) == 4
    source.dataset.samples = source.dataset.samples[:1]
    source.sample_offset = 0
    assert [len(g) for g in source.get_samples(1)] == [2]


class OwnDataset:
    """Of a user who has one without ``copies``."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)


def test_a_data_set_of_the_users_own_kind(tmp_path):
    source = RolloutDataSource(make_args(prompt_data=numbered(tmp_path)))
    source.dataset = OwnDataset(list(source.dataset.samples))
    [[one, other]] = source.get_samples(1)
    assert one.prompt == other.prompt == "p0"
    assert one.metadata is not other.metadata


def test_a_file_that_is_written_to_during_the_run(tmp_path):
    path = tmp_path / "d.jsonl"
    numbered(tmp_path)
    data = dataset(path)
    with path.open("a") as file:
        file.write('{"prompt": "more", "label": 1}\n')
    assert data.copies(4, 1)[0].prompt == "p4"  # rows that are added change nothing
    text = path.read_text()
    path.write_text(text.replace("p3", "q3"))
    assert data.copies(2, 1)[0].prompt == "p2"
    with pytest.raises(DataChanged, match="has been changed while this run uses it"):
        data.copies(3, 1)
    path.write_text("")
    with pytest.raises(DataChanged):
        data.copies(2, 1)
    again = dataset(numbered(tmp_path))
    os.replace(write_jsonl(tmp_path / "new", [{"prompt": "new", "label": 1}]), path)
    assert again.copies(3, 1)[0].prompt == "p3"  # replaced by renaming: the old file is still there for us


def test_epochs_are_shuffled_by_seed_and_epoch(tmp_path):
    """The order is that of random.shuffle, seeded by the sum."""
    data = dataset(numbered(tmp_path, 50), seed=7)
    for epoch in (0, 3):
        order = list(range(50))
        random.Random(7 + epoch).shuffle(order)
        data.shuffle(epoch)
        assert prompts(data) == [f"p{i}" for i in order]


def test_without_a_global_data_set_samples_are_empty_and_numbered():
    source = RolloutDataSourceWithBuffer(make_args(rollout_global_dataset=False, prompt_data="/is/not/read.jsonl"))
    groups = source.get_samples(2)
    assert [(s.prompt, s.index, s.group_index) for g in groups for s in g] == [
        ("", 0, 0), ("", 1, 0), ("", 2, 1), ("", 3, 1),
    ]  # fmt: skip
    assert len(source) == 0
    source.save(0)


# -- lengths and templates -----------------------------------------------------------------------------------


class Counting:
    """Counts what is tokenized."""

    def __init__(self, inner):
        self.inner, self.calls, self.texts = inner, 0, 0

    def __call__(self, texts, **values):
        self.calls += 1
        self.texts += len(texts)
        return self.inner(texts, **values)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_only_prompts_that_may_be_too_long_are_tokenized_and_many_at_a_time(tmp_path):
    rows = [{"prompt": "x" * n, "label": 1} for n in (3, 900, 1001, 1000)] + [{"prompt": "y" * 800, "label": 1}] * 3000
    counting = Counting(shared_tokenizer(str(tiny_model())))
    data = Dataset(write_jsonl(tmp_path / "d.jsonl", rows), counting, None, 1000, prompt_key="prompt")
    assert (len(data), data.num_dropped) == (3003, 1)
    assert (counting.calls, counting.texts) == (3, 3003)
    assert [len(s.prompt) for s in data.samples[:4]] == [3, 900, 1000, 800]


def test_lengths_are_those_of_the_template_with_its_settings(tmp_path):
    """Also where messages stay messages, which are templated later."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'z' * extra }}")
    tokenizer = load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja"))
    rows = [{"prompt": [{"role": "user", "content": "x" * n}], "label": 1} for n in (2, 4)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    for extra, kept in ((0, 2), (2, 1)):
        for templated in (True, False):
            data = Dataset(
                path, tokenizer, None, 5, prompt_key="prompt", apply_chat_template=templated,
                apply_chat_template_kwargs={"extra": extra},
            )  # fmt: skip
            assert len(data) == kept
            assert isinstance(data[0].prompt, str) == templated


# -- a large file --------------------------------------------------------------------------------------------

ROWS, BROKEN_LINE = 1_000_000, 987_654
LARGE = [
    (b'{"prompt": "1+1=", "lab\n', "Unterminated"),
    (b'{"prompt": "a", "label": "2", "metadata": 5}\n', "is not an object"),
]


@pytest.mark.full
def test_a_broken_line_near_the_end_of_a_large_file_is_found(tmp_path):
    good = b"".join(b'{"prompt": "%d+1=", "label": "%d"}\n' % (i, i + 1) for i in range(1, BROKEN_LINE))
    rest = GOOD * (ROWS - BROKEN_LINE)
    path = tmp_path / "large.jsonl"
    for line, told in LARGE:
        path.write_bytes(good + line + rest)
        number, why = look(path).broken
        assert (number, bool(re.search(told, why))) == (BROKEN_LINE, True)
    path.write_bytes(good + b'{"prompt": "a"}\n' + rest)
    assert look(path).absent == {"label": BROKEN_LINE}


MEASURE = """
import sys
from pathlib import Path
from miles.utils.data import Dataset
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
data = Dataset(sys.argv[1], None, None, None, prompt_key="prompt", label_key="label")
data.shuffle(0)
assert sum(len(data.copies(i, 4)) for i in range(512)) == 2048
print(len(data), (peak() - before) // 1024)
"""


@pytest.mark.full
def test_a_million_rows_take_little_memory(tmp_path):
    """Positions and checksums are 20 MB, an epoch's order 8, and 40 while it is shuffled; objects would be 2 GB."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "%d+1=", "label": "%d"}\n' % (i, i + 1) for i in range(ROWS)))
    found = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, check=True, timeout=100)
    count, megabytes = map(int, found.stdout.split())
    assert count == ROWS
    assert 15 < megabytes < 100


def test_prompts_of_messages_are_told_for_they_need_a_template(tmp_path):
    talk = [{"role": "user", "content": "a"}]
    for prompt, is_messages in ((talk, True), ("a", False)):
        rows = [{"prompt": prompt, "label": "1"}]
        write_jsonl(tmp_path / "d.jsonl", rows)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
        assert look(tmp_path / "d.jsonl").has_messages == look(tmp_path / "d.parquet").has_messages == is_messages
