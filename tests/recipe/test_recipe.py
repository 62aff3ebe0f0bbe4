"""The recipe as a user starts it, with fewer steps: what it says, and everything that it leaves."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.training_runs import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from miles.flags.table import table
from miles.tracking.metrics_file import read_metrics

SCRIPT = ROOT / "examples" / "recipe" / "run-qwen3-tiny-grpo.sh"
FEWER = {
    "--num-rollout": 2,
    "--rollout-batch-size": 6,
    "--over-sampling-batch-size": 9,
    "--global-batch-size": 24,
    "--eval-interval": 2,
    "--save-interval": 2,
}


@dataclass
class Left:
    """What the script said, and where it wrote."""

    output: str
    directory: Path

    def rows(self, event):
        return [row for row in read_metrics(self.directory / "grpo" / "metrics.jsonl") if row["event"] == event]

    def journal(self):
        lines = (self.directory / "grpo" / "journal" / "rollout.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipe")
    environment = os.environ | {
        "RECIPE_DIR": str(directory),
        "PYTHON": sys.executable,
        "WARM_STEPS": "100",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [SCRIPT, *(str(word) for pair in FEWER.items() for word in pair)],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=350, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return Left(done.stdout, directory)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_two_rollouts_are_trained_each_in_two_steps_and_evaluated(left):
    rollouts = left.rows("rollout")
    assert [row["rollout_id"] for row in rollouts] == [0, 1]
    assert Counter(row["rollout_id"] for row in left.rows("step")) == {0: 2, 1: 2}
    assert [row["rollouts_done"] for row in left.rows("eval")] == [0, 2]
    # The recipe's own reward: a tenth for showing the work; such an answer is right or wrong.
    assert all(0 < row["rollout/raw_reward"] < 1.1 for row in rollouts)
    assert "eval after 2 rollouts: sums" in left.output


@pytest.mark.full
@pytest.mark.timeout(400)
def test_only_groups_whose_rewards_differ_are_trained_and_each_other_one_has_its_reason(left):
    reasons = [entry["why"] for entry in left.journal() if entry["kind"] == "filter"]
    dropped = sum(
        value
        for row in left.rows("rollout")
        for name, value in row.items()
        if name.startswith("rollout/dynamic_filter/drop_zero_std_")
    )
    assert len([reason for reason in reasons if reason.startswith("zero_std_")]) == dropped
    assert all(row["rollout/zero_std/all_zero_percentage"] == 0 for row in left.rows("rollout"))


@pytest.mark.full
@pytest.mark.timeout(400)
def test_the_users_log_function_was_called_for_each_rollout_and_suppressed_nothing(left):
    lines = [
        line
        for path in (left.directory / "grpo" / "logs").rglob("*.log")
        for line in path.read_text().splitlines()
        if "answers show their work" in line
    ]
    shown = sorted({int(re.search(r"rollout (\d+): \d+ of 48", line)[1]) for line in lines})
    assert shown == [0, 1]


@pytest.mark.full
@pytest.mark.timeout(400)
def test_the_export_is_a_model_that_transformers_runs_and_the_checkpoint_is_the_newest(left):
    assert (left.directory / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    export = left.directory / "trained-1"
    hf_logging.disable_progress_bar()  # it leaves a thread
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "10+14=?"}], add_generation_prompt=True)
    tokens = torch.tensor([prompt["input_ids"] if hasattr(prompt, "keys") else prompt])
    answer = model.generate(tokens, max_new_tokens=24, do_sample=False)[0, tokens.shape[1] :]
    assert "\\boxed{" in tokenizer.decode(answer)
    warm = AutoModelForCausalLM.from_pretrained(left.directory / "warm", dtype=torch.float32)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(model.state_dict()[name], warm.state_dict()[name])


@pytest.mark.full
@pytest.mark.timeout(400)
def test_the_config_is_the_scripts(left):
    config = json.loads((left.directory / "grpo" / "config.json").read_text())
    assert config["dynamic_sampling_filter_path"].endswith("check_reward_nonzero_std")
    assert config["custom_rm_path"] == "recipe_code.reward"
    assert config["rollout_sample_filter_path"] == "recipe_code.leave_out_unfinished"
    assert (config["over_sampling_batch_size"], config["num_steps_per_rollout"]) == (9, 2)
    assert config["balance_data"]


def words_of(block):
    """The flags in one of the script's arrays, without comments."""
    body = re.search(rf"^{block}=\((.*?)^\)", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[1]
    lines = [line.strip() for line in body.splitlines()]
    return [word for line in lines if not line.startswith("#") for word in line.split() if word.startswith("--")]


BLOCKS = "MODEL CKPT ROLLOUT EVAL PERF GRPO OPTIMIZER SGLANG MISC CUSTOM"


@pytest.mark.parametrize("block", BLOCKS.split())
def test_each_block_has_flags_that_are_honoured(block):
    words = words_of(f"{block}_ARGS")
    assert words
    known = table().by_name
    for word in words:
        assert word.startswith("--sglang-") or known[word].status == "honoured", word


def test_the_model_block_is_the_models_architecture(tmp_path):
    sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))
    try:
        import prepare
    finally:
        sys.path.pop(0)
    (tmp_path / "config.json").write_text(json.dumps(prepare.model_config(end=2, pad=0)))
    config = AutoConfig.from_pretrained(tmp_path)
    body = re.search(r"^MODEL_ARGS=\((.*?)^\)", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[1].split()
    typed = {name: body[place + 1] for place, name in enumerate(body[:-1]) if name.startswith("--")}
    assert int(typed["--num-layers"]) == config.num_hidden_layers
    assert int(typed["--hidden-size"]) == config.hidden_size
    assert int(typed["--ffn-hidden-size"]) == config.intermediate_size
    assert int(typed["--num-query-groups"]) == config.num_key_value_heads
    assert int(typed["--kv-channels"]) == config.head_dim
    assert int(typed["--vocab-size"]) == config.vocab_size
