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
RPP = "--normalize-advantages --advantage-estimator reinforce_plus_plus"
PPO, OPD = "--advantage-estimator ppo", "--use-opd --opd-type"
URLS, STEP = "--opd-teacher-urls", "--opd-teacher-ckpt-step"
WITH_EXPERTS = with_directory(
    "M",
    replace(
        MODEL,
        config={
            **MODEL.config,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
)
MIMO = with_directory(
    "M",
    replace(
        MODEL,
        config={
            **MODEL.config,
            "architectures": ["MiMoForCausalLM"],
            "model_type": "mimo",
            "attention_bias": True,
            "num_nextn_predict_layers": 1,
        },
    ),
)
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
    (10, f"{RPP} --kl-coef 0.1", FACTS, values(ref_load="/home/me/M")),
    (10, f"{RPP} --kl-coef 0.1 --ref-load N", FACTS, told("--ref-load", "no such directory")),
    (11, "--use-opd", FACTS, told("--opd-type", "needs a teacher")),
    (11, f"{OPD} megatron", FACTS, told("--opd-type", "--opd-teacher-load")),
    (11, f"{OPD} megatron --opd-teacher-load N", FACTS, told("--opd-teacher-load", "no such directory")),
    (11, f"{OPD} megatron --opd-teacher-load L", WITH_LOAD, values(opd_teacher_load="/home/me/L")),
    (11, f"{OPD} megatron --opd-teacher-load L --opd-teacher-ckpt-step 4", WITH_LOAD, told(STEP, "3, 7")),
    (11, f"{OPD} megatron --opd-teacher-load M --opd-teacher-urls a=http://h", FACTS, told(URLS, "a checkpoint")),
    (11, f"{OPD} sglang --rm-url http://h --opd-teacher-load M", FACTS, told("--opd-teacher-load", "a server")),
    (11, f"{OPD} sglang", FACTS, told(URLS, "no address")),
    (11, f"{OPD} sglang --opd-teacher-urls h", FACTS, told(URLS, "not NAME=URL")),
    (11, f"{OPD} sglang --rm-type remote_rm --rm-url http://h", FACTS, told(URLS, "no address")),
    (11, f"{OPD} sglang --rm-url http://h", FACTS, values(custom_rm_path=None, rm_type="math")),
    (11, "--opd-type sglang", FACTS, told("--opd-type", "nothing is distilled")),
    (11, "--opd-log-prob-top-k 5", FACTS, told("--opd-log-prob-top-k", "not built yet")),
    (12, "", FACTS, values(no_load_optim=True, no_load_rng=True, finetune=True, load=None)),
    (12, "--load E", EMPTY, notice("--load E has no", "a fresh start")),
    (12, "--load L", WITH_LOAD, values(no_load_optim=False, no_load_rng=False, finetune=False)),
    (13, "--eval-interval 2", FACTS, told("--eval-interval", "no evaluation data")),
    (15, "--save-interval 2", FACTS, told("--save-interval", "--save DIR")),
    (15, "--save-hf X", FACTS, told("--save-hf", "--save DIR")),
    (15, "--save-trigger-sentinel X", FACTS, told("--save-trigger-sentinel", "--save")),
    (16, "--lora-rank 4", FACTS, told("--target-modules", "all-linear")),
    (16, "--lora-rank 4 --target-modules all-linear --exclude-modules q_proj", FACTS, values(lora_rank=4)),
    (18, f"{RPP} --kl-coef 0.1 --use-kl-loss --kl-loss-coef 0.1", FACTS, told("--kl-coef", "in the loss")),
    (18, f"{RPP} --kl-coef 0.1 --use-kl-loss", FACTS, values(kl_coef=0.1)),
    (18, "--kl-coef 0.1", FACTS, values(kl_coef=0.0, ref_load=None) | notice("--kl-coef has no effect")),
    (19, "--advantage-estimator reinforce_plus_plus", FACTS, told("--advantage-estimator", "--normalize-advantages")),
    (
        19,
        "--advantage-estimator reinforce_plus_plus_baseline",
        FACTS,
        told("--advantage-estimator", "--normalize-advantages"),
    ),
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
    (29, f"{PPO} --kl-coef 0.1", FACTS, told("--kl-coef", "--use-kl-loss")),
    (29, f"{PPO} --train-backend fsdp", FACTS, told("--advantage-estimator", "critic", "--train-backend megatron")),
    (29, f"{PPO} --critic-num-nodes 2", FACTS, told("--critic-num-nodes", "actor's ranks")),
    (29, f"{PPO} --critic-num-gpus-per-node 1", FACTS, told("--critic-num-gpus-per-node", "actor's ranks")),
    (
        29,
        f"{PPO} --save S/ --lr 0.5 --critic-num-nodes 1",
        FACTS,
        values(critic_save="/home/me/S_critic", critic_lr=0.5, critic_num_gpus_per_node=2),
    ),
    (29, f"{PPO} --critic-save S", FACTS, told("--critic-save", "--save")),
    (29, f"{PPO} --save S --critic-save S/", FACTS, told("--critic-save", "the actor's checkpoints")),
    (29, f"{PPO} --critic-load N", FACTS, told("--critic-load", "no such directory")),
    (29, f"{PPO} --critic-load E", EMPTY, told("--critic-load", "no checkpoint")),
    (29, f"{PPO} --critic-load L --critic-lr 0.1", WITH_LOAD, values(critic_load="/home/me/L", critic_lr=0.1)),
    (29, f"{PPO} --disable-compute-advantages-and-returns", FACTS, told("--advantage-estimator", "returns")),
    (29, f"{PPO} --min-lr 0.1 --lr 1 --critic-lr 0.01", FACTS, told("--critic-lr", "below --min-lr")),
    (
        29,
        f"{PPO} --lr-decay-style linear --critic-lr-warmup-iters 99",
        FACTS,
        told("--critic-lr-warmup-iters", "decayed after 8"),
    ),
    (29, f"{PPO} --num-critic-only-steps 8", FACTS, notice("the actor does not learn")),
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
    (53, "--skip-actor-forward-only --keep-old-actor", FACTS, told("--keep-old-actor", "no pass")),
    (53, "--skip-actor-forward-only --hidden-dropout 0.1", FACTS, told("--hidden-dropout", "same dropout")),
    (46, "--enable-mtp-training", FACTS, told("--enable-mtp-training", "no such layers")),
    (46, "--enable-mtp-training --mtp-num-layers 1", MIMO, values(mtp_num_layers=1, mtp_loss_scaling_factor=0.2)),
    (46, "--mtp-num-layers 1", FACTS, told("--mtp-num-layers", "none of ours")),
    (46, "--mtp-num-layers 2", MIMO, told("--mtp-num-layers", "0 or 1")),
    (46, "", MIMO, values(mtp_num_layers=0, add_qkv_bias=True)),
    (46, "--mtp-num-layers 1 --pipeline-model-parallel-size 2", MIMO, told("--mtp-num-layers", "pipeline stages")),
    (46, "--mtp-num-layers 1 --train-backend fsdp", MIMO, told("--mtp-num-layers", "Megatron")),
    (46, "--train-backend fsdp", MIMO, told("--train-backend", "MiMo")),
    (
        46,
        "--mtp-num-layers 1 --custom-model-provider-path m.f",
        MIMO,
        told("--mtp-num-layers", "a model of your own"),
    ),
    (
        46,
        "--enable-mtp-training --mtp-num-layers 1 --mtp-loss-scaling-factor -1",
        MIMO,
        told("--mtp-loss-scaling-factor", "unlearn"),
    ),
    (47, "--use-rollout-routing-replay", WITH_EXPERTS, values(use_routing_replay=True)),
    (47, "--use-rollout-routing-replay", FACTS, told("--use-rollout-routing-replay", "no experts")),
    (47, "--use-routing-replay", WITH_EXPERTS, values(use_rollout_routing_replay=False)),
    (47, "--use-routing-replay", FACTS, told("--use-routing-replay", "no experts")),
    (47, "--use-routing-replay --loss-type sft_loss", WITH_EXPERTS, told("--use-routing-replay", "no pass before")),
    (47, "--use-routing-replay --use-rollout-logprobs", WITH_EXPERTS, told("--use-routing-replay", "no pass over old")),
    (
        47,
        "--use-routing-replay --skip-actor-forward-only --num-steps-per-rollout 1",
        WITH_EXPERTS,
        told("--use-routing-replay", "--skip-actor-forward-only"),
    ),
    (47, "--use-rollout-routing-replay --use-rollout-logprobs", WITH_EXPERTS, values(use_routing_replay=True)),
    (53, "--skip-actor-forward-only --loss-type custom_loss", FACTS, told("--skip-actor-forward-only", "no such pass")),
    (53, f"--skip-actor-forward-only {RPP} --kl-coef 0.1", FACTS, told("--skip-actor-forward-only", "--kl-coef")),
    (
        53,
        f"--skip-actor-forward-only {OPD} sglang --rm-url http://h",
        FACTS,
        told("--skip-actor-forward-only", "--use"),
    ),
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
    14: "--eval-num-gpus",
    17: "--multi-lora-n-adapters",
    28: "--ci-inject-rollout-data-path",
    32: "--ci-test",
    33: "--update-weight-transfer-mode --update-weight-disk-dir",
    37: "--rematerialize-param-from-master-weight",
    41: "--eval-hf-dir",
    49: "--use-indexer-replay",
}
"""Rules of features that are not built: their flags are refused by name."""

ELSEWHERE = {
    35: "a critic, which is asleep between its turns",
    36: "of a memory saver that buffers here do not need: sleeping copies them out itself",
    48: "test_a_config_file_is_applied_before_anything_is_derived",
    51: "server groups, external engines: the engines' own tests",
    52: "padded batches: test_trainer_rules.py",
    39: "test_async_rules.py",
    40: "test_async_rules.py",
    55: "test_async_rules.py",
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
    for name, value in (("--qkv-format", "bshd"),):
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
