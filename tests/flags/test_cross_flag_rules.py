"""The rules between flags of the reference system, by number: each has its case, or belongs to flags that are refused.

A case is a number, flags, and what must come of them: ``told`` (flag of a problem, and words in it), ``values`` (of the
resolved config) or ``notice`` (words of one). A rule whose flags are refused stands in REFUSED: with the day on which
its flags are honoured, the test there fails, and the rule needs a case.
"""

import base64
from dataclasses import replace

import pytest
from support.flag_cases import CHECKPOINT, DATA, FACTS, GPUS, MODEL, RECIPE, outcome, with_data, with_directory

from miles.flags.facts import DirectoryFacts, EvalSet
from miles.flags.parse import parse
from miles.flags.table import table

SPLIT = RECIPE.replace(" --colocate", "") + " --rollout-num-gpus 2"
WITH_LOAD = with_directory("L", CHECKPOINT)
EMPTY = with_directory("E", DirectoryFacts(exists=True))
EVALS = replace(FACTS, eval_sets=(EvalSet("D", "prompt", "label"),))


def told(flag, *words):
    return {"told": (flag, words)}


def values(**fields):
    return {"values": fields}


def notice(*words):
    return {"notice": words}


CASES = [
    (3, "--eval-prompt-data D --eval-interval 2", EVALS, values(eval_prompt_data=["aime", "/home/me/D"])),
    (3, "--eval-interval 2", replace(FACTS, eval_error="odd"), told("--eval-prompt-data", "odd", "NAME PATH")),
    (
        9,
        "--chat-template-path t",
        replace(FACTS, missing_files=frozenset("t")),
        told("--chat-template-path", "no such"),
    ),
    (9, "--chat-template-path t --apply-chat-template", FACTS, values(sglang_chat_template="/home/me/t")),
    (9, "--chat-template-path t", FACTS, values(chat_template_path="/home/me/t")),
    (10, "--use-kl-loss --ref-load N", FACTS, told("--ref-load", "no such directory")),
    (10, "--use-kl-loss", FACTS, values(ref_load="/home/me/M")),
    (12, "", FACTS, values(no_load_optim=True, no_load_rng=True, finetune=True, load=None)),
    (12, "--load E", EMPTY, notice("--load E has no", "a fresh start")),
    (12, "--load L", WITH_LOAD, values(no_load_optim=False, no_load_rng=False, finetune=False)),
    (13, "--eval-interval 2", FACTS, told("--eval-interval", "no evaluation data")),
    (15, "--save-interval 2", FACTS, told("--save-interval", "--save DIR")),
    (15, "--save-hf X", FACTS, told("--save-hf", "--save DIR")),
    (15, "--save-trigger-sentinel X", FACTS, told("--save-trigger-sentinel", "--save")),
    (20, "--use-rollout-logprobs --use-tis", FACTS, told("--use-tis", "nothing to correct")),
    # Here what is watched has a built-in function, so that none need be given.
    (21, "--get-mismatch-metrics", FACTS, values(get_mismatch_metrics=True, custom_tis_function_path=None)),
    (22, "--use-dynamic-batch-size", FACTS, told("--use-dynamic-batch-size", "--max-tokens-per-gpu")),
    (23, "--use-dynamic-global-batch-size", FACTS, told("--use-dynamic-global-batch-size", "fixed number")),
    (24, "--balance-by-flops", FACTS, told("--balance-by-flops", "fixed number of samples")),
    (25, "--eps-clip 0.3 --custom-rm-path my.rm --reward-key r", FACTS, values(eps_clip_high=0.3, eval_reward_key="r")),
    (25, "--eps-clip-high 0.4", FACTS, values(eps_clip=0.2, eps_clip_high=0.4)),
    (
        26,
        "--dump-details X",
        FACTS,
        values(
            save_debug_rollout_data="/home/me/X/rollout_data/{rollout_id}.pt",
            save_debug_train_data="/home/me/X/train_data/{rollout_id}_{rank}.pt",
        ),
    ),
    (27, "--load-debug-rollout-data f --num-rollout 1", FACTS, values(debug_train_only=True, rollout_num_gpus=0)),
    (30, "--offload --no-offload-train", FACTS, values(offload_rollout=True, offload_train=False)),
    (31, "--debug-rollout-only", FACTS, values(colocate=False, offload_train=False, world_size=0)),
    (31, "--debug-rollout-only --debug-train-only", FACTS, told("--debug-rollout-only", "neither trainer nor engines")),
    (34, "", GPUS, values(offload_train=True, offload_rollout=True, sglang_cuda_graph_backend_prefill="disabled")),
    (34, "--no-offload-train", FACTS, values(offload_train=False, offload_rollout=True)),
    (34, "--rollout-num-gpus 7", FACTS, notice("--rollout-num-gpus 7 is ignored")),
    (38, "--offload-train-target disk", FACTS, values(offload_train_disk_dir="/runs/new/offload")),
    (42, "--global-batch-size 8 --num-steps-per-rollout 2", FACTS, told("--num-steps-per-rollout", "= 32", "= 16")),
    (42, "--num-steps-per-rollout 2", FACTS, values(global_batch_size=16)),
    (43, "--n-samples-per-prompt 1", FACTS, values(grpo_std_normalization=False)),
    (44, "--over-sampling-batch-size 4", FACTS, told("--over-sampling-batch-size", "8 or more")),
    (44, "", FACTS, values(over_sampling_batch_size=8)),
    (45, "", FACTS, values(num_rollout=8)),
    (45, "--num-epoch 3", FACTS, values(num_rollout=24)),
    (45, "--num-epoch 3 --num-rollout 5", FACTS, notice("--num-epoch is ignored")),
    (50, "--rollout-max-context-len 100", FACTS, values(eval_max_context_len=100, rollout_max_prompt_len=99)),
    (50, "--rollout-max-context-len 100 --rollout-max-prompt-len 100", FACTS, told("--rollout-max-prompt-len", "99")),
    (
        53,
        "--skip-actor-forward-only --num-steps-per-rollout 2",
        FACTS,
        told("--skip-actor-forward-only", "2 optimizer"),
    ),
    (53, "--skip-actor-forward-only --hidden-dropout 0.1", FACTS, told("--hidden-dropout", "same dropout")),
    (53, "--skip-actor-forward-only --loss-type custom_loss", FACTS, told("--skip-actor-forward-only", "no such pass")),
    (54, "--rollout-num-gpus-per-engine 2", FACTS, values(sglang_tp_size=2)),
    (54, "--true-on-policy-mode", GPUS, values(sglang_enable_deterministic_inference=True, deterministic_mode=True)),
]
"""Number, flags behind the recipe, facts, what comes of them."""

REFUSED = {
    1: "--use-miles-dashboard",
    2: "--ft-components",
    4: "--mini-ft-controller-enable --control-server-port",
    5: "--enable-witness --enable-event-analyzer --delay-split-train-data-by-dp",
    6: "--indep-dp",
    7: "--recompute-logprobs-via-prefill",
    8: "--use-session-server --tito-model --session-message-matcher",
    11: "--use-opd --opd-type --opd-teacher-load --opd-teacher-urls",
    14: "--eval-num-gpus",
    16: "--lora-rank --target-modules --exclude-modules",
    17: "--multi-lora-n-adapters",
    28: "--ci-inject-rollout-data-path",
    32: "--ci-test",
    33: "--update-weight-transfer-mode --update-weight-disk-dir",
    37: "--rematerialize-param-from-master-weight",
    39: "--async-max-concurrent-samples",
    40: "--fully-async",
    41: "--eval-hf-dir",
    46: "--enable-mtp-training",
    47: "--use-rollout-routing-replay",
    49: "--use-indexer-replay",
}
"""Rules of features that are not built: their flags are refused by name."""

ELSEWHERE = {
    18: "kl_coef is taken as 0 only: test_fixed_values_of_rules",
    19: "estimators: test_fixed_values_of_rules, or the estimators' own tests",
    29: "a critic: test_fixed_values_of_rules, or the estimators' own tests",
    35: "a critic, which is asleep between its turns",
    36: "of a memory saver that buffers here do not need: sleeping copies them out itself",
    48: "test_a_config_file_is_applied_before_anything_is_derived",
    51: "server groups, external engines: the engines' own tests",
    52: "padded batches: test_trainer_rules.py",
    55: "train_async.py is not built; train.py refuses --fully-async",
}
"""Rules whose test is another one, and why."""


@pytest.mark.parametrize(
    ("number", "flags", "facts", "wanted"), CASES, ids=[f"{case[0]}: {case[1] or 'recipe'}" for case in CASES]
)
def test_a_rule(number, flags, facts, wanted):
    resolved = outcome(flags, facts=facts)
    if "told" in wanted:
        flag, words = wanted["told"]
        texts = [" ".join(problem.lines()) for problem in resolved.problems if problem.flag == flag]
        assert texts, [problem.lines() for problem in resolved.problems]
        assert all(any(word in text for text in texts) for word in words), texts
    for key, value in wanted.get("values", {}).items():
        assert resolved.config[key] == value, key
    if "notice" in wanted:
        assert any(all(word in text for word in wanted["notice"]) for text in resolved.notices), resolved.notices
    if "told" not in wanted:
        assert resolved.problems == ()


@pytest.mark.parametrize("number", REFUSED)
def test_a_rule_of_what_is_not_built_is_refused_by_name(number):
    for name in REFUSED[number].split():
        assert table().by_name[name].only is not None, f"{name} is honoured now: rule {number} needs a case"
        assert name in {problem.flag for problem in parse([name, "77"], table()).problems}


def test_fixed_values_of_rules():
    for name, value in (("--kl-coef", "0.1"), ("--advantage-estimator", "ppo"), ("--qkv-format", "bshd")):
        flag = table().by_name[name]
        if flag.only is not None:
            assert parse([name, value], table()).problems[0].flag == name


def test_every_rule_from_1_to_55_is_covered():
    assert {case[0] for case in CASES} | set(REFUSED) | set(ELSEWHERE) == set(range(1, 56))


def test_a_file_may_stand_on_the_command_line():
    from miles.flags.config_file import read_config

    payload = base64.b64encode(b"rollout_batch_size: 4\nmine: [1, 2]\n").decode()
    assert read_config(f"base64:{payload}") == {"rollout_batch_size": 4, "mine": [1, 2]}


def test_the_recipe_itself_has_no_problems_with_engines_of_their_own():
    assert outcome(recipe=SPLIT, facts=with_data("D", DATA, with_directory("M", MODEL))).problems == ()
