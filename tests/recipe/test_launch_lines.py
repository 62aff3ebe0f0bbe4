"""Command lines of published launch scripts of Miles, word for word after their model blocks: what of them is refused,
and that nothing else is in their way on a machine with eight GPUs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.flag_cases import DATA, GPUS, MODEL, QWEN2, QWEN3, RELEASED

from miles.flags.entry import table_for
from miles.flags.facts import DirectoryFacts, EvalSet
from miles.flags.parse import parse
from miles.flags.resolve import resolve

HERE = Path(__file__).parent
LINES = json.loads((HERE / "launch_lines.json").read_text())
BLOCKS = json.loads((HERE.parent / "flags" / "model_blocks.json").read_text())
QWEN3_4B = {
    **QWEN3,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
}
DAPO, AIME = "/root/dapo-math-17k/dapo-math-17k.jsonl", "/root/aime-2024/aime-2024.jsonl"
HERMES = "/root/openhermes2_5.parquet"
GSM8K, GSM8K_TEST = "/root/gsm8k/train.parquet", "/root/gsm8k/test.parquet"
MACHINE = replace(
    GPUS,
    directories={
        "/root/Qwen3-4B": replace(MODEL, config=QWEN3_4B),
        "/root/Qwen3-4B_torch_dist": RELEASED,
        "/root/Qwen3-4B_miles/": DirectoryFacts(exists=False),
        "/root/Qwen3-4B-Base/": replace(MODEL, config=QWEN3_4B),
        "/root/Qwen3-4B-Base_torch_dist": RELEASED,
        "/root/Qwen3-4B-Base_miles/": DirectoryFacts(exists=False),
        "/root/Qwen2.5-0.5B-Instruct/": replace(MODEL, config=QWEN2),
        "/root/Qwen2.5-0.5B-Instruct_torch_dist/": RELEASED,
    },
    data={
        **{path: replace(DATA, rows=17_000, columns=("prompt", "label")) for path in (DAPO, AIME)},
        **{path: replace(DATA, rows=7_000, columns=("messages", "label")) for path in (GSM8K, GSM8K_TEST)},
        HERMES: replace(DATA, rows=1_000_000, columns=("messages",)),
    },
)

CASES = {
    "qwen3-4B": {
        "model": "qwen3-4B",
        "eval": EvalSet(AIME, "prompt", "label", rm_type="deepscaler"),
        "refused": {},
        "resolves": {
            "global_batch_size": 256,
            "num_steps_per_rollout": 1,
            "dp_size": 4,
            "rollout_num_engines": 4,
            "sglang_tp_size": 2,
            "sglang_mem_fraction_static": 0.7,
            "eval_temperature": 1.0,
            "eps_clip_high": 0.28,
            "offload_train": True,
            "params_dtype": "bfloat16",
        },
    },
    "qwen2.5-0.5B-gsm8k": {
        "model": "qwen2.5-0.5B",
        "eval": EvalSet(GSM8K_TEST, "messages", "label", rm_type="math"),
        "refused": {
            "--use-miles-router": "the router is sglang-router",
        },
        "resolves": {
            "dp_size": 8,
            "rollout_num_engines": 8,
            "calculate_per_token_loss": True,
            "deterministic_mode": True,
            "sglang_enable_deterministic_inference": True,
            "sglang_attention_backend": "flashinfer",
            "eval_top_k": 1,
            "wandb_team": "my-team",
        },
        "no effect": ["--sequence-parallel"],  # with one rank of tensor parallelism
    },
    "qwen3-4B-fsdp-mis": {
        "model": None,
        "eval": None,
        "refused": {
            "--attn-implementation": "flash_attention_2, sdpa or eager",
        },
        "resolves": {
            "dp_size": 8,
            "use_tis": True,
            "gradient_checkpointing": True,
            "train_env_vars": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "sglang_decode_log_interval": 1000,
            "sglang_chunked_prefill_size": 4096,
            "custom_tis_function_path": "mis.compute_mis_weights_with_cp",
        },
    },
    "qwen3-4B-base-sft": {
        "model": "qwen3-4B",
        "eval": None,
        "refused": {},
        "resolves": {
            "dp_size": 8,
            "num_rollout": 3 * (1_000_000 // 128),
            "loss_type": "sft_loss",
            "debug_train_only": True,
            "compute_advantages_and_returns": False,
            "lr_warmup_fraction": 0.1,
        },
        "no effect": ["--sequence-parallel"],
    },
}


def outcome(name, without=()):
    case = CASES[name]
    words = [*BLOCKS.get(case["model"], ()), *LINES[name]]
    for flag in without:
        place = words.index(flag)
        end = place + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        del words[place:end]
    flags = table_for(words)
    facts = replace(MACHINE, eval_sets=(case["eval"],) if case["eval"] else ())
    return resolve(parse(words, flags), flags, facts)


def test_there_is_a_case_for_each_command_line():
    assert CASES.keys() == LINES.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_refused_for_its_reason_and_nothing_else_is(name):
    expected = CASES[name]["refused"]
    found = {problem.flag: " ".join(problem.lines()) for problem in outcome(name).problems}
    assert found.keys() == expected.keys()
    for flag, reason in expected.items():
        assert reason in found[flag]


@pytest.mark.parametrize("name", CASES)
def test_without_what_is_refused_it_resolves(name):
    resolved = outcome(name, without=CASES[name]["refused"])
    assert [problem.lines() for problem in resolved.problems] == []
    wanted = CASES[name]["resolves"]
    assert {key: resolved.config[key] for key in wanted} == wanted
    idle = [notice.split()[0] for notice in resolved.notices if "no effect" in notice or "ignored" in notice]
    assert idle == CASES[name].get("no effect", [])


@pytest.mark.parametrize("name", CASES)
def test_every_word_is_a_flag_of_the_table(name):
    known = table_for(LINES[name]).by_name
    assert [word for word in LINES[name] if word.startswith("--") and word not in known] == []
