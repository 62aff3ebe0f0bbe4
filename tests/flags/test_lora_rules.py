"""LoRA: which layers have an adapter, and which checkpoints, adapters and layouts go with it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.flag_cases import CHECKPOINT, FACTS, GPUS, MODEL, QWEN3, config, outcome, problems, with_directory

from miles.flags.facts import CheckpointFacts, DirectoryFacts, gather, look_at
from miles.flags.table import table
from miles.utils.lora import MODULES, LoraSettings, target_modules

LORA = "--lora-rank 4 --lora-alpha 8 --target-modules all-linear"
ADAPTED = DirectoryFacts(
    exists=True,
    newest=CheckpointFacts("megatron", 7, True),
    steps={3: "megatron", 7: "megatron"},
    adapters=frozenset({7}),
)
WHOLE, BOTH = with_directory("L", CHECKPOINT), with_directory("L", ADAPTED)
EXPERTS = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "tie_word_embeddings": False,
}
MOE = with_directory("M", replace(MODEL, config=EXPERTS))
GIVEN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(MODULES)}


def with_adapter(**changed):
    return replace(FACTS, adapter={**GIVEN, **changed})


@pytest.mark.parametrize(
    ("targets", "excluded", "wanted"),
    [
        ("all-linear", None, MODULES),
        ("linear_qkv, linear_fc2", None, ("q_proj", "k_proj", "v_proj", "down_proj")),
        ("up_proj,q_proj", "", ("q_proj", "up_proj")),
        ("all-linear", "linear_fc1,linear_fc2,q_proj", ("k_proj", "v_proj", "o_proj")),
    ],
)
def test_layers_are_named_as_hugging_face_or_megatron_does(targets, excluded, wanted):
    assert target_modules(targets, excluded) == wanted


@pytest.mark.parametrize(
    ("flags", "facts", "flag", "words"),
    [
        ("--lora-rank -1", FACTS, "--lora-rank", "out of range"),
        (f"{LORA} --lora-alpha 0", FACTS, "--lora-alpha", "out of range"),
        (f"{LORA} --lora-dropout 1", FACTS, "--lora-dropout", "out of range"),
        ("--lora-rank 4", FACTS, "--target-modules", "needs it"),
        ("--lora-rank 4 --target-modules q_proj,lm_head", FACTS, "--target-modules", "lm_head"),
        (f"{LORA} --exclude-modules router", FACTS, "--exclude-modules", "router"),
        (f"{LORA} --use-kl-loss --ref-update-interval 2", FACTS, "--ref-update-interval", "which does not move"),
        (f"{LORA} --exclude-modules all-linear", FACTS, "--exclude-modules", "no layer"),
        (f"{LORA} --lora-adapter-path A", replace(FACTS, adapter_error="it has no x"), "--lora-adapter-path", "no x"),
        (f"{LORA} --lora-adapter-path A", with_adapter(r=8), "--lora-adapter-path", "--lora-rank"),
        (f"{LORA} --lora-adapter-path A", with_adapter(lora_alpha=1), "--lora-adapter-path", "--lora-alpha"),
        (f"{LORA} --lora-adapter-path A", with_adapter(target_modules=["q_proj"]), "--lora-adapter-path", "--target-"),
        (f"{LORA} --load L", WHOLE, "--load", "whole weights"),
        (f"{LORA} --load L --ckpt-step 3", BOTH, "--load", "whole weights"),
        ("--load L", BOTH, "--load", "--lora-rank is not given"),
        ("--ref-load L --use-kl-loss", BOTH, "--ref-load", "without the weights below"),
        (f"{LORA} --ref-load L", BOTH, "--ref-load", "without the weights below"),
        (
            f"{LORA} --expert-tensor-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
            *(MOE, "--expert-tensor-parallel-size", "cannot be cut"),
        ),
    ],
)
def test_what_does_not_go_with_it_is_told(flags, facts, flag, words):
    found = problems(flags, facts=facts)
    assert list(found) == [flag]
    assert words in found[flag]


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (LORA, FACTS),
        (f"{LORA} --load L", BOTH),
        (f"{LORA} --load L --finetune", WHOLE),
        (f"{LORA} --load L --finetune --use-fault-tolerance", WHOLE),
        ("--load L --ckpt-step 3", BOTH),
        (f"{LORA} --lora-adapter-path A", with_adapter()),
        (f"{LORA} --train-backend fsdp", FACTS),
        (f"{LORA} --expert-model-parallel-size 2", MOE),
        (f"{LORA} --exclude-modules linear_fc1,linear_fc2 --expert-tensor-parallel-size 2 "
         "--tensor-model-parallel-size 2 --sequence-parallel", MOE),
    ],
)  # fmt: skip
def test_what_goes_with_it(flags, facts):
    config(flags, facts=facts)


def test_the_command_of_the_page_can_be_run():
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text()
    words = re.search(r"```bash\npython train.py (.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    facts = replace(GPUS, directories={"Qwen3-4B": MODEL}, data={"math.jsonl": FACTS.data["D"]})
    found = outcome(recipe=words, facts=facts)
    assert (found.problems, [notice for notice in found.notices if "no effect" in notice]) == ((), [])
    assert {found.config[name] for name in ("lora_rank", "lora_alpha", "target_modules")} == {16, 32, "all-linear"}


def test_a_path_becomes_absolute():
    assert config(f"{LORA} --lora-adapter-path A", facts=with_adapter())["lora_adapter_path"] == "/home/me/A"


def test_whose_a_a_layer_uses():
    shared = LoraSettings(4, 8, 0.0, "lora", target_modules("all-linear", "q_proj"), 0)
    assert shared.sharer("model.layers.1.self_attn.v_proj") == "model.layers.1.self_attn.k_proj"
    assert shared.sharer("model.layers.1.mlp.experts.3.up_proj") == "model.layers.1.mlp.experts.3.gate_proj"
    assert replace(shared, kind="canonical_lora").sharer("x.v_proj") == "x.v_proj"
    assert shared.scaling == 2.0


def test_an_adapter_is_known_by_its_files(tmp_path):
    def seen():
        return gather({**table().defaults(), "lora_adapter_path": str(tmp_path)}, run_dir=str(tmp_path / "run"))

    assert (seen().adapter, seen().adapter_error) == (None, "it has no adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps(GIVEN))
    assert seen().adapter_error == "it has no adapter_model.safetensors"
    (tmp_path / "adapter_model.safetensors").touch()
    assert seen().adapter == GIVEN
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in seen().adapter_error


def test_so_is_a_checkpoint_of_one(tmp_path):
    for name in ("iter_0000003", "iter_0000007/adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("iter_0000003", "iter_0000007"):
        (tmp_path / name / "metadata.json").touch()
    (tmp_path / "iter_0000007/adapter/adapter_config.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    found = look_at(tmp_path)
    assert (found.newest, found.adapters) == (CheckpointFacts("megatron", 7, True), {7})
