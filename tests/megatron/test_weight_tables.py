"""Cutting weights for ranks and putting them together again moves every value to its place, and back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_models import ARCHITECTURES, tensor_shapes, tiny_model

from miles.backends.base import ParallelState
from miles.backends.hf_directory import HFDirectory, UnreadableModelDirectory
from miles.backends.megatron_utils.errors import BadModelDirectory, UnsupportedModel
from miles.backends.megatron_utils.families import read_shape, weight_rules
from miles.backends.megatron_utils.stages import Stage
from miles.backends.megatron_utils.weight_layouts import Cut, FusedQKV, GateAndUp, SwappedHalves, Vocabulary
from miles.backends.megatron_utils.weights import load_hf_weights
from miles.flags.architecture import shape as flags_shape

SIZES = st.sampled_from([1, 2, 4])


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def there_and_back(layout, tensors, size):
    merged = layout.merge([layout.shard(tensors, rank, size) for rank in range(size)])
    assert len(merged) == len(tensors)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(merged, tensors, strict=True))


@given(size=SIZES, groups=st.sampled_from([1, 2, 4, 8]), per_group=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_queries_keys_and_values(size, groups, per_group, bias):
    if (groups * per_group) % size:
        size = 1
    layout = FusedQKV(groups * per_group, groups, 4)
    rest = () if bias else (6,)
    tensors = [numbered(groups * count * 4, *rest) + 1000 * i for i, count in enumerate((per_group, 1, 1))]
    there_and_back(layout, tensors, size)


@given(size=SIZES, rows=st.integers(1, 4))
def test_gate_and_up(size, rows):
    there_and_back(GateAndUp(), [numbered(rows * size, 3), -numbered(rows * size, 3)], size)


@given(size=SIZES, rows=st.integers(1, 4))
def test_halves_that_change_places(size, rows):
    there_and_back(SwappedHalves(), [numbered(rows * size, 6)], size)
    assert SwappedHalves().shard([torch.tensor([[0, 1, 2, 3]])], 0, 1).tolist() == [[2, 3, 0, 1]]


@given(size=SIZES, dim=st.sampled_from([0, 1]))
def test_linears(size, dim):
    there_and_back(Cut(dim), [numbered(8, 12)], size)


@given(size=SIZES, vocab=st.integers(1, 40), spare=st.integers(0, 3))
def test_vocabulary(size, vocab, spare):
    padded = (-(-vocab // size) + spare) * size
    layout = Vocabulary(vocab, padded)
    there_and_back(layout, [numbered(vocab, 3) + 1], size)
    parts = [layout.shard([numbered(vocab, 3) + 1], rank, size) for rank in range(size)]
    assert {len(part) for part in parts} == {padded // size}
    assert torch.cat(parts)[vocab:].eq(0).all()


def test_queries_stand_before_the_key_and_the_value_of_their_group():
    fused = FusedQKV(4, 2, 1).shard(
        [torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])], 0, 1
    )
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mimo"])
def test_the_table_names_every_tensor_once(architecture, tied):
    config = json.loads((tiny_model(architecture, tied=tied) / "config.json").read_text())
    named = [entry for rule in weight_rules(read_shape(config), 384) for entry in rule.hf.items()]
    assert sorted(named) == sorted(tensor_shapes(config))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, "models of type 'gpt2'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"use_sliding_window": True}, "use_sliding_window: True"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "by 'yarn'"),
    ],
    ids=str,
)
def test_what_the_layers_do_not_compute_is_refused(change, told):
    config = json.loads((tiny_model("qwen3") / "config.json").read_text())
    with pytest.raises(UnsupportedModel) as caught:
        read_shape(config | change)
    assert told in str(caught.value)
    assert "--train-backend fsdp" in str(caught.value)


def test_rotary_parameters_are_found_in_either_spelling():
    config = json.loads((tiny_model("llama", rope_scaling="llama3") / "config.json").read_text())
    old = read_shape(config).rope
    parameters = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    assert read_shape(config | {"rope_parameters": parameters}).rope == old


# Directories


@pytest.fixture
def directory(tmp_path):
    """A copy that a test may damage."""
    origin = tiny_model("qwen3", shards=3)
    for file in origin.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


class Parameters(torch.nn.Module):
    """What a model would hold, by the table's names."""

    def __init__(self, shape, rules):
        super().__init__()
        config = {name: torch.zeros(size) for name, size in tensor_shapes(shape)}
        for rule in rules:
            value = rule.layout.shard([config[name] for name in rule.hf], 0, 1)
            self._parameters[rule.megatron] = torch.nn.Parameter(value)


def load(path, config_path=None):
    opened = HFDirectory(path)
    config = opened.config() if config_path is None else json.loads(config_path.read_text())
    rules = weight_rules(read_shape(config), 320)
    model = Parameters(config, rules)
    shape = read_shape(config)
    stage = Stage(0, 1, (range(shape.layers),), 0, 0, shape.tied)
    load_hf_weights(model, rules, opened, stage=stage, parallel=ParallelState())
    return model


def test_a_directory_in_several_files_is_read(directory):
    whole = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    model = load(directory)
    assert torch.equal(model._parameters["decoder.final_layernorm.weight"], whole["model.norm.weight"])


def first(directory):
    return directory / "model-00001-of-00003.safetensors"


def rewrite(directory, change):
    tensors = load_file(first(directory))
    change(tensors)
    save_file(tensors, first(directory))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    others = {k: v for k, v in index["weight_map"].items() if v != first(directory).name}
    index["weight_map"] = others | dict.fromkeys(tensors, first(directory).name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: rewrite(d, lambda t: t.pop(NORM)), f"missing: {NORM}; left over: none"),
        (lambda d: rewrite(d, lambda t: t.update(extra=torch.zeros(1))), "missing: none; left over: extra"),
        (lambda d: rewrite(d, lambda t: t.update({NORM: torch.ones(7)})), f"{NORM} is (7,), and should be (32,)"),
        (
            lambda d: rewrite(d, lambda t: t.update({"model.embed_tokens.weight": torch.ones(321, 32)})),
            "is (321, 32), and should be (320, 32)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(directory, damage, told):
    damage(directory)
    with pytest.raises(BadModelDirectory) as caught:
        load(directory)
    assert told in str(caught.value)


def cut_off(directory):
    with first(directory).open("r+b") as file:
        file.truncate(500)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: first(d).unlink(), "names files that are not there: model-00001-of-00003.safetensors"),
        (cut_off, "model-00001-of-00003.safetensors"),
        (lambda d: [file.unlink() for file in d.glob("model*")], "no *.safetensors file; there are: config.json"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: "),
        (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    ],
)
def test_what_cannot_be_read_is_refused(directory, damage, told):
    damage(directory)
    with pytest.raises(UnreadableModelDirectory) as caught:
        load(directory)
    assert told in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(UnreadableModelDirectory, match="there is no such directory"):
        HFDirectory(tmp_path / "nowhere")


@pytest.mark.parametrize(("architecture", "width"), [("qwen2", 8), ("qwen3", 128), ("qwen3_moe", 8), ("llama", 8)])
def test_the_width_of_a_head_that_no_config_tells_is_that_of_its_family(architecture, width):
    config = json.loads((tiny_model(architecture) / "config.json").read_text())
    config.pop("head_dim", None)
    assert read_shape(config).head_dim == width
    assert flags_shape(config)["kv_channels"] == width
