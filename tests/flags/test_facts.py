"""What is read from files and the machine before anything is decided."""

import json
import os
import sys

import pytest

from miles.backends.checkpoint_layout import TRACKER
from miles.flags.facts import CheckpointFacts, EvalSet, gather, look_at
from miles.flags.hook_facts import why_not_found
from miles.flags.path_facts import path_errors, why_not_exported, why_unwritable
from miles.flags.prompt_facts import DataFacts, read_data
from miles.flags.table import table


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestPromptFiles:
    def test_rows_columns_and_what_is_absent(self, tmp_path):
        path = jsonl(tmp_path / "d.jsonl", {"prompt": "a", "label": "b"}, "\n", {"prompt": "c"})
        assert read_data(path, ["prompt", "label", "metadata"]) == DataFacts(
            rows=2, columns=("prompt", "label"), absent={"metadata": 1, "label": 3}
        )

    @pytest.mark.parametrize(("text", "number"), [('{"prompt": 1}\n{"prompt"\n', 2), ('"a"\n', 1), ("{}\n\n1\n", 3)])
    def test_the_first_broken_line_has_its_number(self, tmp_path, text, number):
        found = read_data(jsonl(tmp_path / "d.jsonl", text), [])
        assert found.broken[0] == number
        assert found.broken[1]

    def test_bytes_that_are_no_text_are_a_broken_line(self, tmp_path):
        (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
        assert read_data(str(tmp_path / "d.jsonl"), []).broken[0] == 1

    def test_empty(self, tmp_path):
        assert read_data(jsonl(tmp_path / "d.jsonl", ""), ["prompt"]) == DataFacts()

    def test_what_is_no_file(self, tmp_path):
        assert "there is no data file" in read_data(str(tmp_path / "none"), []).error
        assert "directory" in read_data(str(tmp_path), []).error

    @pytest.mark.parametrize(
        ("piece", "rows"), [("[0:3]", 3), ("[2:]", 8), ("[:-1]", 9), ("[5:100]", 5), ("[:]", 10), ("[20:30]", 0)]
    )
    def test_a_slice_counts_its_rows(self, tmp_path, piece, rows):
        path = jsonl(tmp_path / "d.jsonl", *({"prompt": n} for n in range(10)))
        assert read_data(f"{path}@{piece}", []).rows == rows

    @pytest.mark.parametrize("piece", ["[1:3]", "[-3:-1]", "[1:-1]", "[-3:3]"])
    def test_only_what_is_in_the_slice_counts(self, tmp_path, piece):
        path = jsonl(tmp_path / "d.jsonl", {"other": 0}, "\n", {"prompt": 1, "label": 1}, {"prompt": 2}, "{broken\n")
        assert read_data(f"{path}@{piece}", ["prompt", "label"]) == DataFacts(
            rows=2, columns=("prompt", "label"), absent={"label": 4}
        )
        assert read_data(f"{path}@[3:]", []).broken[0] == 5
        for nothing in ("[2:1]", "[0:0]"):
            assert read_data(f"{path}@{nothing}", ["prompt"]) == DataFacts(bytes=os.path.getsize(path))

    def test_a_parquet_file_is_read_or_says_what_is_missing(self, tmp_path):
        (tmp_path / "d.parquet").write_bytes(b"no")
        assert read_data(str(tmp_path / "d.parquet"), []).error


class TestDirectories:
    def test_a_model(self, tmp_path):
        for name in ("tokenizer.json", "model-00001-of-00002.safetensors"):
            (tmp_path / name).touch()
        (tmp_path / "config.json").write_text('{"hidden_size": 4}')
        found = look_at(tmp_path)
        assert (found.exists, found.config, found.has_tokenizer, found.has_weights) == (
            True,
            {"hidden_size": 4},
            True,
            True,
        )
        assert found.newest is None

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_config_that_is_none(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        found = look_at(tmp_path)
        assert found.config is None
        assert "config.json" in found.config_error

    def test_a_tokenizer_of_two_files(self, tmp_path):
        (tmp_path / "vocab.json").touch()
        assert not look_at(tmp_path).has_tokenizer
        (tmp_path / "merges.txt").touch()
        assert look_at(tmp_path).has_tokenizer

    def checkpoint(self, path, backend="megatron"):
        (path / "model").mkdir(parents=True)
        (path / ("metadata.json" if backend == "megatron" else "meta.json")).touch()

    @pytest.mark.parametrize("backend", ["megatron", "fsdp"])
    def test_checkpoints(self, tmp_path, backend):
        self.checkpoint(tmp_path / "iter_0000012", backend)
        self.checkpoint(tmp_path / "iter_0000003", backend)
        (tmp_path / "iter_0000020").mkdir()  # never finished
        (tmp_path / TRACKER).write_text("12\n")
        found = look_at(tmp_path)
        assert (found.newest, found.is_checkpoint) == (CheckpointFacts(backend, 12), False)
        assert found.steps == {3: backend, 12: backend}
        itself = look_at(tmp_path / "iter_0000003")
        assert (itself.newest, itself.is_checkpoint) == (CheckpointFacts(backend, 3), True)

    def test_what_convert_writes(self, tmp_path):
        self.checkpoint(tmp_path / "release")
        (tmp_path / TRACKER).write_text("release")
        assert look_at(tmp_path).newest == CheckpointFacts("megatron", None)

    @pytest.mark.parametrize(("text", "why"), [("12", "names a checkpoint"), ("x", "says 'x'"), ("3", "incomplete")])
    def test_a_checkpoint_that_cannot_be_used(self, tmp_path, text, why):
        (tmp_path / "iter_0000003").mkdir()
        (tmp_path / TRACKER).write_text(text)
        found = look_at(tmp_path)
        assert found.newest is None
        assert why in found.checkpoint_error

    def test_nothing(self, tmp_path):
        assert not look_at(tmp_path / "none").exists


class TestWriting:
    def test_what_does_not_exist_can_be_made(self, tmp_path):
        assert why_unwritable(tmp_path / "a" / "b") == ""

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "f").touch()
        assert "is a file" in why_unwritable(tmp_path / "f" / "b")

    def test_a_link_to_nowhere(self, tmp_path):
        (tmp_path / "l").symlink_to(tmp_path / "gone")
        assert "link to nowhere" in why_unwritable(tmp_path / "l")


class TestExports:
    def test_what_can_be_written(self, tmp_path):
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / ".complete").touch()
        (tmp_path / "empty").mkdir()
        for name in ("", "new", "ours", "empty", "{rollout_id}", "a/hf-{rollout_id:04d}"):
            assert why_not_exported(name and f"{tmp_path}/{name}") == "", name

    def test_what_cannot(self, tmp_path):
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "x").touch()
        assert "something already" in why_not_exported(f"{tmp_path}/theirs")
        assert "something already" in why_not_exported(f"{tmp_path}/theirs/x")
        assert "is a file" in why_not_exported(f"{tmp_path}/theirs/x/{{rollout_id}}")
        for wrong in ("{step}", "{0}", "{rollout_id", "{rollout_id.x}"):
            assert "only {rollout_id}" in why_not_exported(f"{tmp_path}/{wrong}"), wrong


class TestPathsOfLaterOn:
    def told(self, **values):
        return path_errors(values, "/tmp/run")

    def test_what_can_be_written(self, tmp_path):
        template = f"{tmp_path}/new/{{rollout_id}}"
        assert not self.told(
            save_debug_rollout_data=template, save_debug_train_data=template + "-{rank:03d}.pt",
            save_debug_trajectory_data=template, eval_interval=1, save_trigger_sentinel=f"{tmp_path}/now",
            record_memory_history=True, memory_snapshot_dir=str(tmp_path),
        )  # fmt: skip
        assert not self.told(memory_snapshot_dir="/dev/null/x")  # nothing is recorded

    @pytest.mark.parametrize(
        "dest",
        ["save_debug_rollout_data", "save_debug_train_data", "save_debug_trajectory_data", "load_debug_rollout_data"],
    )
    def test_templates(self, dest, tmp_path):
        (tmp_path / "file").touch()
        for wrong in ("a{b}.pt", "{0}", "{rollout_id", "{rollout_id.x}"):
            assert "can stand in braces" in self.told(**{dest: f"{tmp_path}/{wrong}"})[dest]
        if dest.startswith("save"):
            assert "is a file" in self.told(**{dest: f"{tmp_path}/file/{{rollout_id}}.pt"})[dest]
            assert "is a directory" in self.told(**{dest: str(tmp_path)})[dest]

    def test_evaluations_have_no_number(self, tmp_path):
        values = {"save_debug_rollout_data": f"{tmp_path}/{{rollout_id:04d}}.pt"}
        assert not self.told(**values)
        assert "'eval_0' for evaluations" in self.told(**values, eval_interval=1)["save_debug_rollout_data"]

    def test_what_is_loaded_is_there(self, tmp_path):
        (tmp_path / "[1]").mkdir()
        template = f"{tmp_path}/[1]/{{rollout_id:03d}}.pt"
        assert "there is no file" in self.told(load_debug_rollout_data=template)["load_debug_rollout_data"]
        (tmp_path / "[1]" / "002.pt").touch()
        assert not self.told(load_debug_rollout_data=template)

    def test_where_memory_is_written_and_what_asks_for_a_checkpoint(self, tmp_path):
        (tmp_path / "file").touch()
        found = self.told(
            record_memory_history=True, memory_snapshot_dir="file", run_dir=str(tmp_path),
            save_trigger_sentinel=str(tmp_path),
        )  # fmt: skip
        assert "is a file" in found["memory_snapshot_dir"]
        assert "is a directory" in found["save_trigger_sentinel"]


class TestHooks:
    def test_found_without_being_run(self, tmp_path, monkeypatch):
        (tmp_path / "user_hook_module.py").write_text("raise SystemExit('was run')\ndef reward(): pass\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert why_not_found("user_hook_module.reward") == ""
        assert "user_hook_module" not in sys.modules

    @pytest.mark.parametrize(
        ("path", "why"),
        [
            ("reward", "not of the form"),
            ("nowhere_at_all.x", "no module"),
            ("json.none.x", ""),
            ("miles.rollout.checkpoint_eval.CheckpointEvalFn", "not built yet: evaluation of checkpoints"),
            ("miles.router.router.MilesRouter", "not built yet"),
            ("miles_plugins.models.x", "not built yet"),
            ("miles.rollout.nonsense.x", "no module"),
            ("json.nosuch", "has no 'nosuch'; it has: JSONDecodeError"),
            ("json.load_", "did you mean load"),
            ("json.codecs", "is a module, and no function"),
            ("json.decoder", ""),
            ("json.tool", "json.tool is a module"),
        ],
    )
    def test_not_found(self, path, why):
        assert why in why_not_found(path)
        assert why_not_found(path) or path == "json.decoder"

    @pytest.mark.parametrize(
        "text",
        [
            "async def f(): pass", "class f: pass", "f = 1", "f: int = 1", "from os import sep as f", "a, (b, *f) = x",
            "if x:\n    pass\nelse:\n    def f(): pass", "try:\n    import a\nexcept E:\n    f = None",
            "for f in y: pass", "with y as f: pass", "(f := 1)", "def g():\n    global f\n    f = 1",
            "from os import *", "def __getattr__(name): pass",
            "globals()['f'] = 1", "setattr(m, 'f', 1)", "exec('f = 1')",
            "import sys\nsys.modules[__name__] = x",
        ],
    )  # fmt: skip
    def test_what_binds_a_name_or_may(self, text, tmp_path, monkeypatch):
        (tmp_path / "hooks_of_a_test.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert why_not_found("hooks_of_a_test.f") == ""

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("def g():\n    f = 1\n    globals()", "has no 'f'"),
            ("class C:\n    def f(): pass", "has no 'f'"),
            ("x.f = 1", "has no 'f'"),
            ("import os as f", "is a module"),
            ("def f(:", "line 1: "),
        ],
    )
    def test_what_does_not(self, text, why, tmp_path, monkeypatch):
        (tmp_path / "hooks_of_a_test.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert why in why_not_found("hooks_of_a_test.f")


def test_everything_that_flags_name_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "p.jsonl", {"prompt": "1"})
    jsonl(tmp_path / "e.jsonl", {"q": "1"}, {"q": "2"})
    (tmp_path / "file").touch()
    values = {
        **table().defaults(),
        "hf_checkpoint": "m",
        "prompt_data": "p.jsonl",
        "eval_prompt_data": ["one", "e.jsonl", "same", "p.jsonl"],
        "eval_input_key": "q",
        "chat_template_path": "none.jinja",
        "save": "file",
        "save_hf": "file",
        "custom_rm_path": "nowhere_at_all.rm",
        "save_debug_rollout_data": "file/x",
    }
    facts = gather(values, run_dir="file/run")
    assert set(facts.directories) == {"m", "file"}
    assert facts.data["p.jsonl"].rows == 1
    assert facts.data["p.jsonl"].absent == {"label": 1, "metadata": 1, "q": 1}
    assert facts.data["e.jsonl"].absent == {"label": 1}
    assert [found.path for found in facts.eval_sets] == ["e.jsonl", "p.jsonl"]
    assert set(facts.unwritable) == {"file", "file/run"}
    assert "something already" in facts.export_error
    assert facts.missing_files == {"none.jinja"}
    assert "is a file" in facts.path_errors["save_debug_rollout_data"]
    assert set(facts.hook_errors) >= {"nowhere_at_all.rm"}
    assert facts.cores >= 1
    assert facts.cwd == os.getcwd()


def test_what_is_evaluated_may_stand_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "e.jsonl", {"q": 1})
    (tmp_path / "eval.yaml").write_text(
        "eval:\n  datasets:\n  - {name: e, path: e.jsonl, input_key: q, label_key: a,\n"
        "     custom_generate_function_path: nowhere.at.all}\n"
    )
    facts = gather({**table().defaults(), "eval_config": "eval.yaml"}, run_dir="r")
    assert facts.eval_sets == (EvalSet("e.jsonl", "q", "a", generate="nowhere.at.all"),)
    assert "nowhere.at.all" in facts.hook_errors
    assert facts.data["e.jsonl"].absent == {"a": 1}
    (tmp_path / "eval.yaml").write_text("eval: 3")
    assert "names no data sets" in gather({**table().defaults(), "eval_config": "eval.yaml"}, run_dir="r").eval_error
