"""Prompt data: what is read, what is dropped and counted, and what is refused with where it is."""

import base64
import json
import logging
import os
from dataclasses import asdict, fields

import pytest
from support.rollout_cases import make_args, write_jsonl
from support.tiny_models import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from miles.rollout.saved_state import CannotSave, NotSavable
from miles.utils.data import AllPromptsTooLong, BrokenRow, Dataset, EmptyDataset, MissingColumn, NoDataset
from miles.utils.eval_config import BadEvalConfig, EvalDatasetConfig, eval_datasets
from miles.utils.mask_utils import BadConversation, MultiTurnLossMaskGenerator
from miles.utils.processing_utils import NoChatTemplate, NoTokenizer, load_tokenizer, shared_tokenizer

ROWS = [{"text": f"prompt {i}", "answer": i, "metadata": {"level": i}} for i in range(6)]
CHAT = [{"role": "user", "content": "2+2?"}]


def tokenizer():
    return shared_tokenizer(str(tiny_model()))


def dataset(path, max_length=None, **values):
    return Dataset(str(path), tokenizer(), None, max_length, **{"label_key": "answer", **values})


def test_rows_become_samples(tmp_path):
    data = dataset(write_jsonl(tmp_path / "d.jsonl", ROWS))
    assert [s.prompt for s in data.samples] == [f"prompt {i}" for i in range(6)]
    assert data[2].label == "2"
    assert data[2].metadata == {"level": 2}


@pytest.mark.parametrize(
    ("part", "found"), [("[1:3]", [1, 2]), ("[:2]", [0, 1]), ("[4:]", [4, 5]), ("[-2:]", [4, 5]), ("[:]", range(6))]
)
def test_a_slice_of_rows(tmp_path, part, found):
    data = dataset(write_jsonl(tmp_path / "d.jsonl", ROWS) + "@" + part)
    assert [s.prompt for s in data.samples] == [f"prompt {i}" for i in found]


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path, caplog):
    rows = [*ROWS, {"text": "a prompt that is too long", "answer": 1}]
    with caplog.at_level(logging.WARNING):
        data = dataset(write_jsonl(tmp_path / "d.jsonl", rows), 8)
    assert len(data) == 6
    assert data.num_dropped == 1
    assert "1 of 7 prompts are longer than 8 tokens" in caplog.text


def test_a_text_that_normalising_makes_eleven_times_as_long_is_counted(tmp_path):
    """U+FDFA, three bytes, is a phrase of 33 bytes in NFKC, and a tokenizer of single bytes makes a token of each."""
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=made)
    assert len(of_bytes("\ufdfa" * 10)["input_ids"]) == 330
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "\ufdfa" * 10}, {"text": "a"}])
    for limit, dropped in ((330, 0), (329, 1), (100, 1)):
        assert Dataset(str(path), of_bytes, None, limit).num_dropped == dropped


def test_chat_templates_with_tools_and_settings(tmp_path):
    template = "{{ tools | length }}{{ mood }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}!{% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows = [{"text": CHAT, "tools": tools}, {"text": "hello", "tools": json.dumps(tools)}]
    data = Dataset(
        write_jsonl(tmp_path / "d.jsonl", rows), load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja")), None,
        None, tool_key="tools", apply_chat_template=True, apply_chat_template_kwargs={"mood": "calm"},
    )  # fmt: skip
    assert [s.prompt for s in data.samples] == ["1calm<user>2+2?!", "1calm<user>hello!"]
    assert data[1].metadata["tools"] == tools


def test_messages_stay_messages_without_the_flag(tmp_path):
    data = dataset(write_jsonl(tmp_path / "d.jsonl", [{"text": CHAT}]), 100, label_key=None)
    assert data[0].prompt == CHAT


def test_shuffling_depends_on_seed_and_epoch_only(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    one, other = dataset(path), dataset(path)
    one.shuffle(0)
    one.shuffle(3)
    other.shuffle(3)
    assert [s.prompt for s in one.samples] == [s.prompt for s in other.samples]
    assert [s.prompt for s in one.samples] != [s.prompt for s in one.origin_samples]


@pytest.mark.parametrize(
    ("text", "values", "error", "told"),
    [
        ("", {}, EmptyDataset, "is empty"),
        ("\n\n", {}, EmptyDataset, "has no rows"),
        ('{"text": "a", "answer": 1}\n{"text": \n', {}, BrokenRow, "line 2"),
        ("[1]\n", {}, NoDataset, "holds a list"),
        ('{"text": "a", "answer": 1}\n[1]\n', {}, BrokenRow, "a list, not an object"),
        ('{"prompt": "a", "label": 1}\n', {}, MissingColumn, "'text', which --input-key.*\n.*'prompt', 'label'"),
        ('{"text": "a"}\n', {}, MissingColumn, "'answer', which --label-key"),
        ('{"text": 3, "answer": 1}\n', {}, BrokenRow, "not text or a list of messages"),
        ('{"text": "a", "answer": 1, "metadata": [1]}\n', {}, BrokenRow, "--metadata-key"),
        ('{"text": "a", "answer": 1, "t": "x"}\n', {"tool_key": "t"}, BrokenRow, "a list of tools"),
        ('{"text": "a long prompt", "answer": 1}\n', {"max_length": 3}, AllPromptsTooLong, "the shortest has 13"),
    ],
)
def test_what_cannot_be_used_is_refused_with_where_it_is(tmp_path, text, values, error, told):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(error, match=told):
        dataset(path, **values)


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(NoDataset, match=r"has: train\.jsonl"):
        dataset(tmp_path / "trian.jsonl")
    with pytest.raises(NoDataset, match="there is no directory"):
        dataset(tmp_path / "nowhere" / "train.jsonl")


def test_parquet_is_read_where_its_library_is_and_refused_where_not(tmp_path):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        with pytest.raises(NoDataset, match="needs pyarrow"):
            dataset(path)
        return
    with pytest.raises(BrokenRow, match="cannot be read"):
        dataset(path)
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert [(s.prompt, s.label) for s in dataset(f"{path}@[4:]").samples] == [("prompt 4", "4"), ("prompt 5", "5")]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(NoTokenizer, match=r"it has: config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_template_that_is_missing_or_refuses_is_told(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": CHAT}])
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no such role') }}")
    plain = load_tokenizer(str(tiny_model()))
    plain.chat_template = None
    with pytest.raises(NoChatTemplate, match="has no chat template"):
        Dataset(path, plain, None, None, apply_chat_template=True)
    refusing = load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja"))
    with pytest.raises(NoChatTemplate, match="no such role"):
        Dataset(path, refusing, None, None, apply_chat_template=True)
    with pytest.raises(NoChatTemplate, match="cannot be read"):
        load_tokenizer(str(tiny_model()), str(tmp_path / "nothing.jinja"))


# -- data sources --------------------------------------------------------------------------------------------


def source_args(tmp_path, **values):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    return make_args(prompt_data=path, input_key="text", label_key="answer", save=str(tmp_path), load=str(tmp_path),
                     **values)  # fmt: skip


def prompts(groups):
    return [group[0].prompt.split()[1] for group in groups]


def test_groups_count_up_through_epochs(tmp_path):
    source = RolloutDataSource(source_args(tmp_path))
    groups = [*source.get_samples(4), *source.get_samples(9)]
    assert prompts(groups) == [str(i % 6) for i in range(13)]
    assert [g[0].group_index for g in groups] == list(range(13))
    assert [s.index for g in groups for s in g] == list(range(26))
    assert groups[0][0] is not groups[0][1]
    assert groups[0][0].metadata is not groups[0][1].metadata
    assert source.epoch_id == 2


def test_position_and_buffer_are_as_before_after_loading(tmp_path):
    import torch

    args = source_args(tmp_path, rollout_shuffle=True)
    one = RolloutDataSourceWithBuffer(args)
    groups = one.get_samples(8)
    groups[3][0].tokens, groups[3][0].response_length = [1, 2, 3], 2
    groups[3][0].metadata["odd"] = {"set": {1, 2}, "bytes": b"\0"}
    one.add_samples(groups[3:5])
    one.update_metadata({"mine": 1})
    one.save(7)
    state = torch.load(tmp_path / "rollout" / "global_dataset_state_dict_7.pt", weights_only=True)
    assert (state["epoch_id"], state["sample_offset"], state["metadata"]) == (1, 2, {"mine": 1})
    other = RolloutDataSourceWithBuffer(args)
    other.load(7)
    assert other.buffer == one.buffer
    assert [[s.to_dict() for s in g] for g in other.get_samples(9)] == [
        [s.to_dict() for s in g] for g in one.get_samples(9)
    ]


def test_loading_what_is_not_there_begins_at_the_beginning(tmp_path):
    source = RolloutDataSourceWithBuffer(source_args(tmp_path))
    source.load(3)
    source.load(-1)
    assert prompts(source.get_samples(1)) == ["0"]


def test_the_users_buffer_filter_chooses(tmp_path):
    source = RolloutDataSourceWithBuffer(source_args(tmp_path, buffer_filter_path="support.rollout_hooks.newest_first"))
    source.add_samples(source.get_samples(3))
    assert prompts(source.get_samples(2)) == ["2", "1"]
    assert source.get_buffer_length() == 1


def test_an_object_that_cannot_be_saved_is_named_and_the_old_file_stays(tmp_path):
    source = RolloutDataSourceWithBuffer(source_args(tmp_path))
    source.add_samples(source.get_samples(1))
    source.save(1)
    before = (tmp_path / "rollout" / "rollout_buffer_1.msgpack").read_bytes()
    source.buffer[0][0].metadata["client"] = object()
    with pytest.raises(NotSavable, match="client"):
        source.save(1)
    assert (tmp_path / "rollout" / "rollout_buffer_1.msgpack").read_bytes() == before
    assert not [p for p in (tmp_path / "rollout").iterdir() if "aside" in p.name]


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    source = RolloutDataSourceWithBuffer(source_args(tmp_path))
    (tmp_path / "file").write_text("")
    source.args.save = str(tmp_path / "file")
    with pytest.raises(CannotSave, match="What was saved before is untouched"):
        source.save(1)


def test_a_full_disk_is_told(tmp_path):
    source = RolloutDataSourceWithBuffer(source_args(tmp_path))
    source.save(1)
    position = tmp_path / "rollout" / "global_dataset_state_dict_1.pt"
    before = position.read_bytes()
    for name in (position.name, "rollout_buffer_1.msgpack"):
        aside = position.with_name(f".{name}.{os.getpid()}.aside")
        aside.symlink_to("/dev/full")
        with pytest.raises(CannotSave, match="cannot be written"):
            source.save(1)
    assert position.read_bytes() == before


# -- evaluation ----------------------------------------------------------------------------------------------


def test_settings_of_evaluations_come_from_the_nearest(tmp_path):
    config = {
        "eval": {
            "defaults": {"temperature": 0.5, "n_samples_per_eval_prompt": 2},
            "datasets": [{"name": "a", "path": "a.jsonl", "temperature": 0.1}, {"name": "b", "path": "b.jsonl"}],
        }
    }
    (tmp_path / "e.yaml").write_text(json.dumps(config))
    args = make_args(eval_config=str(tmp_path / "e.yaml"), eval_top_p=0.3, eval_temperature=0.9, rollout_top_k=5)
    a, b = eval_datasets(args)
    assert (a.temperature, b.temperature) == (0.1, 0.5)
    assert (a.top_p, a.top_k, a.max_response_len, a.n_samples_per_eval_prompt) == (0.3, 5, 32, 2)
    (tmp_path / "e.yaml").write_text("eval:\n  datasets:\n  - {name: y, path: y.jsonl, stop: ['#']}\n")
    assert eval_datasets(args)[0].stop == ["#"]
    args.eval_config = "base64:" + base64.b64encode(json.dumps(config).encode()).decode()
    assert [c.name for c in eval_datasets(args)] == ["a", "b"]


NEAREST = [
    # field, its flags from the nearest on, a value for each of: data set, defaults, first flag, second flag
    ("input_key", ("eval_input_key", "input_key"), ("a", "b", "c", "d")),
    ("label_key", ("eval_label_key", "label_key"), ("a", "b", "c", "d")),
    ("tool_key", ("eval_tool_key", "tool_key"), ("a", "b", "c", "d")),
    ("metadata_key", ("metadata_key",), ("a", "b", "c")),
    ("n_samples_per_eval_prompt", ("n_samples_per_eval_prompt",), (1, 2, 3)),
    ("temperature", ("eval_temperature", "rollout_temperature"), (0.0, 0.2, 0.3, 0.4)),
    ("top_p", ("eval_top_p", "rollout_top_p"), (0.1, 0.2, 0.3, 0.4)),
    ("top_k", ("eval_top_k", "rollout_top_k"), (1, 2, 3, 4)),
    ("max_response_len", ("eval_max_response_len", "rollout_max_response_len"), (1, 2, 3, 4)),
    ("min_new_tokens", ("eval_min_new_tokens",), (1, 2, 3)),
    ("max_prompt_len", ("eval_max_prompt_len", "rollout_max_prompt_len"), (1, 2, 3, 4)),
    ("max_context_len", ("eval_max_context_len", "rollout_max_context_len"), (1, 2, 3, 4)),
    ("stop", ("rollout_stop",), (["a"], ["b"], ["c"])),
    ("stop_token_ids", ("rollout_stop_token_ids",), ([1], [2], [3])),
    ("rm_type", (), ("math", "f1")),
    ("custom_generate_function_path", (), ("a.b", "c.d")),
    ("apply_chat_template", (), (False, True)),
    ("metadata_overrides", (), ({"a": 1}, {"b": 2})),
]


def test_each_setting_of_an_evaluation_has_its_place_in_the_table_below():
    assert {name for name, _, _ in NEAREST} == {f.name for f in fields(EvalDatasetConfig)} - {"name", "path"}


@pytest.mark.parametrize(("name", "flags", "values"), NEAREST, ids=[row[0] for row in NEAREST])
def test_each_setting_comes_from_the_nearest(tmp_path, name, flags, values):
    """The data set's, else the defaults', else the flag of evaluations, else that of rollouts."""
    args = make_args(**dict(zip(flags, values[2:], strict=True)))
    layers = [{"name": "a", "path": "x", name: values[0]}, {name: values[1]}]
    for gone in range(2 + len(flags)):
        section = {"datasets": [layers[0]], "defaults": layers[1]}
        (tmp_path / "e.yaml").write_text(json.dumps({"eval": section}))
        vars(args)["eval_config"] = str(tmp_path / "e.yaml")
        assert getattr(eval_datasets(args)[0], name) == values[gone]
        if gone < 2:
            layers[gone] = {**layers[gone], name: None}
        else:
            vars(args)[flags[gone - 2]] = None


def test_user_code_sees_the_data_sets_of_the_config():
    """What was checked at the start is what is evaluated, whatever becomes of the file."""
    [one] = eval_datasets(make_args(eval_prompt_data=["x", "x.jsonl"], eval_top_p=0.5))
    args = make_args(eval_datasets=[asdict(one)], eval_config="/is/gone.yaml")
    assert args.eval_datasets == [one] == eval_datasets(args)


def test_evaluations_by_flag(tmp_path):
    assert eval_datasets(make_args()) == []
    [one] = eval_datasets(make_args(eval_prompt_data=["x.jsonl"]))
    assert (one.name, one.path) == ("aime", "x.jsonl")
    assert [c.name for c in eval_datasets(make_args(eval_prompt_data=["a", "1", "b", "2"]))] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1", "cannot be read"),
        ("- 1", "not a mapping"),
        ("{}", "names no data sets"),
        ('{"eval": {"datasets": [{"name": "a"}]}}', "names no data sets"),
        ('{"eval": {"datasets": [{"name": "a", "path": "b", "temprature": 1}]}}', "unknown settings temprature"),
        ('{"eval": {"datasets": [{"name": "a", "path": "b", "temperature": "hot"}]}}', "temperature is not a number"),
        ('{"eval": {"datasets": [{"name": "a", "path": "b", "stop": "x"}]}}', "stop is not a list of texts"),
        (
            "eval: {datasets: [{name: a, path: b, metadata_overrides: {day: 2026-01-01}}]}",
            "metadata_overrides is not a mapping that JSON can hold",
        ),
        ('{"eval": {"datasets": [{"name": "a", "path": "b", "top_k": true}]}}', "top_k is not a whole number"),
        ('{"eval": {"datasets": [{"name": "a", "path": "b"}, {"name": "a", "path": "c"}]}}', "two .* are called a"),
        ('{"eval": {"datasets": [{"name": "a", "path": "b"}], "defaults": [1]}}', "eval.defaults is"),
    ],
)
def test_descriptions_of_evaluations_that_cannot_be_used(tmp_path, text, told):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(BadEvalConfig, match=told):
        eval_datasets(make_args(eval_config=str(tmp_path / "e.yaml")))
    with pytest.raises(BadEvalConfig, match="pairs of a name and a path"):
        eval_datasets(make_args(eval_prompt_data=["a", "b", "c"]))


# -- conversations -------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.mark.parametrize(
    ("kind", "learnt"),
    [
        ("qwen", ["4<|im_end|>", "6<|im_end|>"]),
        ("qwen3", ["4<|im_end|>", "6<|im_end|>"]),
        ("distill_qwen", ["6<|im_end|>"]),
    ],
)
def test_what_assistants_wrote_is_learnt(kind, learnt):
    masks = MultiTurnLossMaskGenerator(tokenizer(), kind)
    tokens, mask = masks.get_loss_mask(TALK)
    assert masks.get_text_from_loss_mask(tokens, mask) == learnt
    whole = tokenizer().apply_chat_template(TALK, tokenize=False)
    assert tokenizer().decode(tokens) == (whole if kind != "distill_qwen" else whole.rstrip("\n"))
    assert len(tokens) == len(mask)


def test_a_message_can_be_left_out():
    masks = MultiTurnLossMaskGenerator(tokenizer())
    talk = [dict(m) for m in TALK]
    talk[2]["step_loss_mask"] = 0
    tokens, mask = masks.get_loss_mask(talk)
    assert masks.get_text_from_loss_mask(tokens, mask) == ["6<|im_end|>"]


def test_a_generation_prompt_that_is_not_how_answers_begin(tmp_path):
    """As with templates whose generation prompt opens a thought that answers in the data do not have."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}#{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    masks = MultiTurnLossMaskGenerator(load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja")))
    tokens, mask = masks.get_loss_mask(TALK)
    assert masks.get_text_from_loss_mask(tokens, mask) == ["4#", "6#"]


def test_conversations_that_cannot_be_learnt(tmp_path):
    with pytest.raises(BadConversation, match="no assistant message"):
        MultiTurnLossMaskGenerator(tokenizer()).get_loss_mask(CHAT)
    with pytest.raises(BadConversation, match="--loss-mask-type odd"):
        MultiTurnLossMaskGenerator(tokenizer(), "odd")
    (tmp_path / "t.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rewriting = load_tokenizer(str(tiny_model()), str(tmp_path / "t.jinja"))
    with pytest.raises(BadConversation, match="rewrites earlier messages"):
        MultiTurnLossMaskGenerator(rewriting).get_loss_mask(TALK)
