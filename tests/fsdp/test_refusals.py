"""What this backend does not do is refused by name; what a device cannot do by default becomes what it can."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.backend_cases import backend_args
from support.ranks import RanksFailed, run_ranks
from support.tiny_models import tiny_model

from miles.backends.fsdp_utils.errors import BadModelDirectory, FsdpFlagRefused
from miles.backends.fsdp_utils.model import read_config
from miles.backends.fsdp_utils.settings import process_group_backend, settings_of
from miles.backends.hf_directory import UnreadableModelDirectory


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2"),
        ({"pipeline_model_parallel_size": 4}, "--pipeline-model-parallel-size 4"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"attn_implementation": "magic"}, "--attn-implementation magic"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"device": "cuda", "fsdp_cpu_offload": True, "offload_train_target": "disk"}, "--offload-train-target disk"),
    ],
)
def test_flags_are_refused_by_name(flags, named):
    with pytest.raises(FsdpFlagRefused, match=named):
        settings_of(backend_args(tiny_model("qwen3"), **flags))


def test_flash_attention_is_what_is_installed():
    path, installed = tiny_model("qwen3"), importlib.util.find_spec("flash_attn") is not None
    args = backend_args(path, device="cuda", attn_implementation="flash_attention_2")
    assert settings_of(args).attention == ("flash_attention_2" if installed else "sdpa")
    args.explicit_flags = ["attn_implementation"]
    if installed:
        assert settings_of(args).attention == "flash_attention_2"
    else:
        with pytest.raises(FsdpFlagRefused, match="needs the package flash-attn"):
            settings_of(args)


def test_defaults_become_what_a_cpu_can_do(caplog):
    caplog.set_level(logging.INFO)
    args = backend_args(tiny_model("qwen3"), attn_implementation="flash_attention_2", fsdp_cpu_offload=True)
    settings = settings_of(args)
    assert settings.attention == "sdpa"
    assert not settings.cpu_offload
    assert "--attn-implementation: sdpa" in caplog.text
    assert "--fsdp-cpu-offload: nothing to do" in caplog.text
    assert process_group_backend(args) == "gloo"
    args.device = "cuda"
    assert process_group_backend(args) == "cpu:gloo,cuda:nccl"


def test_directories_that_hold_no_such_model_are_refused(tmp_path):
    with pytest.raises(UnreadableModelDirectory):
        read_config(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(BadModelDirectory, match="architecture") as refused:
        read_config(tmp_path)
    assert refused.value.code == "E-FSDP-002"


def test_missing_and_misshapen_weights_are_named(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:3].contiguous()}, file)
    with pytest.raises(RanksFailed, match=r"up_proj.weight has another shape than config.json says"):
        run_ranks(1, _init, path)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(RanksFailed, match=r"1 weights are missing[\s\S]*layers.1.mlp.up_proj"):
        run_ranks(1, _init, path)


def _init(path):
    from miles.backends.fsdp_utils.backend import FSDPBackend

    FSDPBackend(backend_args(path)).init()


def test_a_critic_is_refused():
    with pytest.raises(RanksFailed, match=r"trains no critic[\s\S]*E-FSDP-001"):
        run_ranks(1, _critic, tiny_model("qwen3"))


def _critic(path):
    from miles.backends.fsdp_utils.backend import FSDPBackend

    FSDPBackend(backend_args(path), role="critic")
