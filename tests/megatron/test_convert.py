"""Weights go between Hugging Face directories and torch_dist checkpoints, both ways, unchanged."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support.hf_reference import load_hf_model
from support.megatron_cases import make_backend, save_backend, train_one, weights_of
from support.ranks import run_ranks
from support.tiny_models import ARCHITECTURES, MIMO, MOE, tiny_model

from miles.backends import hf_export
from miles.backends.checkpoint_layout import EXPORTED
from miles.backends.hf_export import export_hf


def tensors_of(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def convert(*arguments):
    from miles.convert import main

    return main([str(argument) for argument in arguments])


def run_convert(*arguments, limit=None):
    return run_ranks(1, captured, arguments, limit, distributed=False)[0]


def captured(arguments, limit):
    import contextlib
    import io
    import resource
    import signal

    out, err = io.StringIO(), io.StringIO()
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = convert(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return code, out.getvalue() + err.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, MOE, MIMO])
def test_there_and_back_is_exact(tmp_path, architecture, dtype):
    origin = tiny_model(architecture, tied=architecture == "qwen3", shards=2, vocab=300, dtype=dtype)
    there, back = tmp_path / "torch_dist", tmp_path / "deep" / "hf"
    assert run_convert("hf-to-torch-dist", origin, there) == (0, f"{there} is complete\n")
    # Without a word of warning from torch.
    assert run_convert("torch-dist-to-hf", there, back, "--hf-checkpoint", origin) == (0, f"{back} is complete\n")
    assert_same(tensors_of(back), tensors_of(origin))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (origin / name).read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((origin / "config.json").read_text())
    assert (back / EXPORTED).is_file()
    assert sorted(os.listdir(tmp_path)) == ["deep", "torch_dist"]
    assert os.listdir(tmp_path / "deep") == ["hf"]


def loaded(path, changed):
    backend = make_backend(path, **changed)
    return backend.start, weights_of(backend)


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("flag", ["load", "ref_load"])
def test_a_converted_checkpoint_is_loaded(tmp_path, flag, tp_size):
    origin, other = tiny_model("qwen3"), tiny_model("qwen3", seed=3)
    run_convert("hf-to-torch-dist", other, tmp_path / "out")
    changed = {"tensor_model_parallel_size": tp_size, flag: str(tmp_path / "out")}
    for start, weights in run_ranks(tp_size, loaded, origin, changed):
        assert start == 0
        assert_same(weights, tensors_of(other))


def trained(path, root, changed):
    backend = make_backend(path, **changed)
    for number in range(2):
        train_one(backend, number)
        save_backend(backend, root, number)
        export_hf(backend, backend.args, root / f"hf-{number}")
    # Once more to the same place, as after a resume from further back.
    export_hf(backend, backend.args, root / "hf-1")


@pytest.mark.parametrize(
    ("world", "changed"),
    [(1, {"params_dtype": "bfloat16"}), pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.full)],
    ids=str,
)
def test_checkpoints_of_a_run_become_what_the_run_exports(tmp_path, world, changed):
    origin = tiny_model("qwen3", tied=False, vocab=300)
    run_ranks(world, trained, origin, tmp_path, changed)
    for number, extra in ((1, []), (0, ["--ckpt-step", "0"])):
        out = tmp_path / f"out-{number}"
        assert run_convert("torch-dist-to-hf", tmp_path, out, "--hf-checkpoint", origin, *extra)[0] == 0
        assert_same(tensors_of(out), tensors_of(tmp_path / f"hf-{number}"))
    dtype = changed.get("params_dtype", "float32")
    assert json.loads((tmp_path / "hf-0" / "config.json").read_text())["torch_dtype"] == dtype
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def exported_in_shards(path, out):
    hf_export.MAX_SHARD_BYTES = 50_000
    backend = make_backend(path)
    export_hf(backend, backend.args, out)
    return load_hf_model(out).state_dict()


def test_large_exports_are_cut_into_files_that_transformers_loads(tmp_path):
    origin, out = tiny_model("qwen3", tied=False), tmp_path / "out"
    state = run_ranks(1, exported_in_shards, origin, out)[0]
    assert_same(state, tensors_of(origin))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (
        sum(tensor.nbytes for tensor in state.values())
        == json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )


def test_what_is_there_is_not_overwritten(tmp_path):
    origin = tiny_model("qwen3")
    (tmp_path / "there").mkdir()
    for arguments in (
        ("hf-to-torch-dist", origin, tmp_path / "there"),
        ("torch-dist-to-hf", origin, tmp_path / "there", "--hf-checkpoint", origin),
    ):
        code, text = run_convert(*arguments)
        assert code == 2
        assert "E-CKPT-005" in text
    assert os.listdir(tmp_path / "there") == []


def exported_over(path, out):
    backend = make_backend(path)
    export_hf(backend, backend.args, out)


def test_an_export_does_not_replace_what_is_no_export(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AssertionError, match="E-MODEL-003"):
        run_ranks(2, exported_over, tiny_model("qwen3"), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(("command", "code"), [("hf-to-torch-dist", "E-CKPT-004"), ("torch-dist-to-hf", "E-MODEL-002")])
def test_a_write_that_fails_leaves_nothing(tmp_path, command, code):
    origin = tiny_model("qwen3")
    run_convert("hf-to-torch-dist", origin, tmp_path / "good")
    source = origin if command == "hf-to-torch-dist" else tmp_path / "good"
    extra = [] if command == "hf-to-torch-dist" else ["--hf-checkpoint", origin]
    status, text = run_convert(command, source, tmp_path / "out", *extra, limit=60_000)
    assert (status, code in text) == (2, True), text
    assert os.listdir(tmp_path) == ["good"]


@pytest.mark.parametrize(
    ("name", "code"), [("nowhere", "E-CKPT-001"), ("", "E-CKPT-001")], ids=["no directory", "no checkpoint"]
)
def test_a_source_without_a_checkpoint_is_refused(tmp_path, name, code):
    origin = tiny_model("qwen3")
    status, text = run_convert("torch-dist-to-hf", tmp_path / name, tmp_path / "out", "--hf-checkpoint", origin)
    assert (status, code in text) == (2, True), text
    assert os.listdir(tmp_path) == []


def without_further_layers(path, converted, root):
    """Weights of runs that leave the layers for further tokens out, begun from a conversion that has them."""
    found = []
    for flag in ("load", "ref_load"):
        backend = make_backend(path, **{flag: str(converted)})
        found.append(weights_of(backend))
        save_backend(backend, root / flag, 0)
        export_hf(backend, backend.args, root / f"{flag}-hf")
        backend.close()
    return found


def test_layers_for_further_tokens_may_be_left_out_on_the_way(tmp_path):
    """``--mtp-num-layers 0`` with MiMo: its conversions are loaded, and what it saves and exports is converted."""
    origin, other = tiny_model(MIMO), tiny_model(MIMO, seed=3)
    run_convert("hf-to-torch-dist", other, tmp_path / "whole")
    expected = {name: tensor for name, tensor in tensors_of(other).items() if "mtp" not in name}
    assert len(expected) < len(tensors_of(other))
    for weights in run_ranks(1, without_further_layers, origin, tmp_path / "whole", tmp_path)[0]:
        assert_same(weights, expected)
    assert_same(tensors_of(tmp_path / "load-hf"), expected)
    assert run_convert("torch-dist-to-hf", tmp_path / "load", tmp_path / "back", "--hf-checkpoint", origin)[0] == 0
    assert_same(tensors_of(tmp_path / "back"), expected)
    assert run_convert("hf-to-torch-dist", tmp_path / "load-hf", tmp_path / "again")[0] == 0
    assert_same(run_ranks(1, loaded, origin, {"ref_load": str(tmp_path / "again")})[0][1], expected)
