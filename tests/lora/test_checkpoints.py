"""A checkpoint holds the adapter, what its optimizer keeps, and no weight below; it goes on bit for bit, on its own
base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lora_cases import ALL, merged, read_adapter
from support.lora_runs import resumed_run, started_weights, whole_run
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model
from torch.distributed.checkpoint import FileSystemReader

pytestmark = pytest.mark.full
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
DROPS = {"lora_dropout": 0.3}
LAYOUTS = {
    "SP 2": ("megatron", 2, SP2 | DROPS),
    "FSDP 2": ("fsdp", 2, {"dp_size": 2} | DROPS),
    "PP 2": ("megatron", 2, {"pipeline_model_parallel_size": 2, "lora_type": "canonical_lora"} | DROPS),
    "DP 2": ("megatron", 2, {"dp_size": 2, "params_dtype": "bfloat16"} | DROPS),
    "EP 2": ("megatron", 2, {"dp_size": 2, "expert_model_parallel_size": 2}),
    "SGD": ("megatron", 2, {"tensor_model_parallel_size": 2, "optimizer": "sgd", "sgd_momentum": 0.9, "lr": 0.1}),
    "FSDP": ("fsdp", 1, {"params_dtype": "bfloat16"} | DROPS),
}
FIRST = ("SP 2", "FSDP 2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Makes a run of two rollouts, saved between them, once for each layout."""
    made = {}

    def get(name):
        if name not in made:
            kind, world, changed = LAYOUTS[name]
            path = tiny_model("qwen3_moe" if name == "EP 2" else "qwen3")
            root = tmp_path_factory.mktemp("run")
            made[name] = (path, root, run_ranks(world, whole_run, path, kind, changed, root))
        return made[name]

    return get


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in FIRST)) for name in LAYOUTS]
)
def test_a_resumed_run_goes_on_bit_for_bit(run, name):
    path, root, expected = run(name)
    kind, world, changed = LAYOUTS[name]
    resumed = run_ranks(world, resumed_run, path, kind, changed, root)
    for (start, middle, end), (saved, last) in zip(resumed, expected, strict=True):
        assert start == 1
        assert_same(middle, saved)
        assert_same(end, last)


@pytest.mark.parametrize("name", FIRST)
def test_nothing_of_the_weights_below_is_in_it(run, name):
    _, root, _ = run(name)
    directory = root / "iter_0000000"
    kind = LAYOUTS[name][0]
    places = [directory] if kind == "megatron" else [directory / "model", directory / "optimizer"]
    keys = {key for place in places for key in FileSystemReader(place).read_metadata().state_dict_metadata}
    tensors = {key for key in keys if not key.startswith(("rng_state", "optimizer.rerun", "rerun"))}
    assert tensors
    assert [key for key in tensors if ".adapter." not in key] == []


@pytest.mark.parametrize("name", [*FIRST, pytest.param("EP 2", marks=pytest.mark.long)])
def test_the_adapter_beside_it_is_what_the_merged_weights_are_made_of(run, name):
    path, root, [(saved, _), *_] = run(name)
    directory = root / "iter_0000000" / "adapter"
    config = json.loads((directory / "adapter_config.json").read_text())
    said = {key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules", "task_type", "bias")}
    assert said == {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": list(ALL), "task_type": "CAUSAL_LM",
        "bias": "none",
    }  # fmt: skip
    assert config["base_model_name_or_path"] == str(path)
    weights = merged(path, read_adapter(directory), 5 / 3)
    assert saved.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.long)])
def test_other_layouts_take_it_over(run, world):
    path, root, [(saved, _), *_] = run("SP 2")
    layout = {} if world == 1 else {"pipeline_model_parallel_size": 2, "dp_size": 2}
    for start, weights in run_ranks(world, started_weights, path, "megatron", {**layout, "load": str(root)}):
        assert start == 1
        assert_same(weights, saved)
    (start, weights), *_ = run_ranks(
        1, started_weights, path, "fsdp", {"lora_adapter_path": str(root / "iter_0000000/adapter")}
    )
    assert start == 0
    for key, value in saved.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", FIRST)
def test_it_can_be_converted(run, name, tmp_path):
    path, root, [(saved, _), *_] = run(name)
    assert run_ranks(1, converted, root, tmp_path / "hf", path, distributed=False) == [0]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(found) == set(saved)
    for key, value in saved.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize("further", [0, pytest.param(1, marks=pytest.mark.long)])
def test_one_of_a_model_with_layers_for_further_tokens_can_be_converted(tmp_path, further):
    """Whether the run had left them out or not: what comes out has what the run's exports have."""
    path = tiny_model("mimo")
    ((saved, _),) = run_ranks(1, whole_run, path, "megatron", {"mtp_num_layers": further}, tmp_path / "save")
    assert any("mtp_layers" in name for name in saved) == bool(further)
    assert run_ranks(1, converted, tmp_path / "save", tmp_path / "hf", path, distributed=False) == [0]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(found) == set(saved)
    for key, value in saved.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)


def converted(root, destination, path):
    from miles.convert import main

    return main(["torch-dist-to-hf", str(root), str(destination), "--hf-checkpoint", str(path)])


def refused(function, *args):
    with pytest.raises(RanksFailed) as failure:
        run_ranks(1, function, *args)
    return str(failure.value)


def elsewhere(path, tmp_path):
    """The same model, one number of which is another."""
    other = tmp_path / "other"
    other.mkdir()
    for file in path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


@pytest.mark.parametrize("name", FIRST)
def test_what_does_not_go_with_it_is_refused(run, name, tmp_path):
    path, root, _ = run(name)
    kind = LAYOUTS[name][0]
    load = {"load": str(root)}
    assert "r: 3 there, 4 wanted" in refused(started_weights, path, kind, {**load, "lora_rank": 4})
    assert "lora_alpha: 5 there" in refused(started_weights, path, kind, {**load, "lora_alpha": 6})
    assert "--lora-type lora" in refused(started_weights, path, kind, {**load, "lora_type": "canonical_lora"})
    assert "belongs to other weights" in refused(started_weights, elsewhere(path, tmp_path), kind, load)
    assert "holds an adapter alone" in refused(started_weights, path, kind, {**load, "lora_rank": 0})
