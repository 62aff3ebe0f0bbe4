"""Honoured means that the value reaches what the flag names: for every honoured flag, the case that shows it.

To add one when a flag becomes honoured, do one of these:

* a row of ``FAST`` or ``WARM`` here: a command line, an observer (a function from the resolved config to what it looks
  at: requests, engine arguments, settings of losses, the learning-rate schedule ...), a key in what it gives, and the
  value that must stand there;
* the name of a test elsewhere, in ``tests/support/flag_reach.py``: a test that fails if the flag does nothing. Its
  module must name the flag or its dest;
* if the flag is a field of a megatron-core configuration: a row of ``CONFIGS`` in
  ``tests/megatron/test_megatron_settings.py``, and its name there.

``test_every_honoured_flag_has_a_case`` fails until that is done.
"""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.flag_cases import CHECKPOINT, FACTS, GPUS, LLAMA, MODEL, config, outcome, with_directory
from support.flag_reach import shown
from support.ranks import run_ranks, warm_process
from support.tiny_models import tiny_model

from miles.flags.facts import DirectoryFacts, EvalSet
from miles.flags.table import table

TESTS = Path(__file__).parents[1]
NAMED = {"eval_sets": (EvalSet("D", "prompt", "label"),)}


def resolved(values):
    return values


def evaluation(values):
    from miles.utils.eval_config import eval_datasets

    return vars(eval_datasets(Namespace(**values))[0])


def engine(values):
    from miles.backends.sglang_utils.server_arguments import server_arguments

    return server_arguments(values, 1)


def router(values):
    from miles.backends.sglang_utils.server_arguments import router_arguments

    return router_arguments(values)


def health(values):
    """As agents are told."""
    from miles.backends.sglang_utils.fleet_parts import health_numbers

    return health_numbers(values)


def offloaded(values):
    from miles.backends.sglang_utils.fleet import EngineFleet

    return {"tags": EngineFleet._offloaded_tags(SimpleNamespace(_config=values))}


def seeded(values):
    """Of the requests of a group's samples, where engines are deterministic."""
    from miles.rollout.inference_rollout.inference_rollout_common import _params_of

    args = Namespace(**values, sglang_enable_deterministic_inference=True)
    return _params_of(args, {}, 2, evaluation=False)


def categories(values):
    from miles.rollout.metrics import _reward_categories
    from miles.utils.types import Sample

    return _reward_categories(Namespace(**values), [Sample(reward={"kind": "a"}), Sample(reward={"kind": "b"})])


def loop(values):
    """What the training loop does in its first iterations."""
    from miles.training.schedule import Cadence, iterations

    made = list(iterations(Cadence.of(values, trains=True, generates=True), start=0, num_rollout=values["num_rollout"]))
    return {"evaluates first": made[0].evaluate_before, "told": [one.rollout_id for one in made if one.is_told]}


def loaded(values):
    """The evaluation function that the rollout manager loads."""
    from miles.rollout.loading import load_all

    return {"evaluates": load_all(Namespace(**{**values, "load_debug_rollout_data": "f"})).eval_function.path}


def read_again(values):
    """Groups that are read of the four that were written."""
    import tempfile

    from miles.rollout.debug_data import load_rollout_data, save_rollout_data
    from miles.utils.types import Sample

    with tempfile.TemporaryDirectory() as place:
        template = place + "/{rollout_id}.pt"
        save_rollout_data(template, 0, [[Sample(index=i, group_index=i)] for i in range(4)], {})
        return {"groups": len(load_rollout_data(template, 0, values["load_debug_rollout_data_subsample"]))}


def process_group(values):
    """Minutes that the only rank of a process group waits for a collective."""
    import torch
    from torch import distributed

    from miles.backends.training_utils.rendezvous import Rendezvous

    args = Namespace(**values)
    meeting = Rendezvous()
    meeting.rank, meeting.world_size = 0, 1
    meeting.join(*meeting.listen(), args)
    backend = distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    minutes = backend.options._timeout.total_seconds() / 60
    meeting.leave()
    return {"minutes": minutes}


def trackers(values):
    """Which there are, and what each is told in its process."""
    from miles.tracking.trackers import chosen, settings_of

    return {"chosen": chosen(values), **settings_of(values)}


def measured(values):
    """The families of metrics of a rollout of two samples."""
    from miles.rollout.metrics import rollout_metrics
    from miles.utils.types import Sample

    groups = [[Sample(index=i, reward=float(i), response="x", response_length=1) for i in range(2)]]
    names = rollout_metrics(Namespace(**values), groups, 1.0)
    return {"turns": any("multi_turn/" in name for name in names), "correct": any("correct_" in name for name in names)}


def verdict(values):
    """Whether a run that reached 0.5 is good enough."""
    from miles.tracking.metric_check import MetricBelowThreshold, MetricCheck

    check = MetricCheck(values["ci_metric_checker_key"], values["ci_metric_checker_threshold"])
    check.see({"eval/x": 0.5})
    try:
        check.verdict()
    except MetricBelowThreshold:
        return {"reached": False}
    return {"reached": True}


def orders(values):
    """What the process of the trackers is told in six rollouts."""
    import tempfile

    from miles.tracking.hub import Tracking

    told = []
    with tempfile.TemporaryDirectory() as place:
        hub = Tracking(values, Path(place), told.append)
        hub._process = SimpleNamespace(send=told.append)
        hub.begin("id", 0)
        for rollout_id in range(6):
            hub.write("rollout", rollout_id, rollout_id + 1, {"rollout/x": 1.0})
        hub._file.close()
    return {
        "limit": told[0]["limits"]["tensorboard"],
        "points": [order["steps"]["rollout/step"] for order in told if order["do"] == "log"],
    }


def answers(values):
    """Sampling parameters of requests, and how many there may be at once."""
    from miles.rollout.inference_rollout.inference_rollout_common import GenerateState

    state = GenerateState(Namespace(**{**values, "hf_checkpoint": str(tiny_model("qwen3"))}))
    return {**state.sampling_params, "at once": state.semaphore._value}


def loss(values):
    from miles.backends.training_utils.loss_hub.settings import LossSettings

    return vars(LossSettings.from_args(Namespace(**values)))


def curve(values):
    """Learning rate and weight decay of ten steps, in Megatron's schedule."""
    import torch

    from miles.backends.megatron_utils.optimizer import build_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=values["lr"])
    optimizer.param_groups[0] |= {"max_lr": values["lr"], "min_lr": values["min_lr"], "wd_mult": 1.0}
    scheduler = build_scheduler(Namespace(**values), optimizer)
    found = {"lr": [], "wd": []}
    for _ in range(10):
        group = optimizer.param_groups[0]
        found["lr"].append(round(group["lr"], 6))
        found["wd"].append(round(group["weight_decay"], 6))
        scheduler.step(1)
    return found


def sleeping(values):
    from miles.backends.training_utils.sleeping import SleepingMemory

    return {"bytes": SleepingMemory(Namespace(**values))._chunk}


def advantages(values):
    from miles.backends.training_utils.loss_hub.settings import AdvantageSettings

    return vars(AdvantageSettings.from_args(Namespace(**values)))


def critic(values):
    """The flags as the critic's backend gets them."""
    from miles.backends.training_utils.critic import critic_args

    return vars(critic_args(Namespace(**values)))


def padded(values):
    from miles.backends.megatron_utils.model import padded_vocab

    return {"rows": padded_vocab(Namespace(**values), 1000)}


def adapters(values):
    from miles.utils.lora import LoraSettings

    found = LoraSettings.from_args(Namespace(**values))
    return {} if found is None else {**vars(found), "scaling": found.scaling}


EVAL = "--eval-interval 1 --eval-prompt-data x D"
TEN = "--num-rollout 10 --lr 1"
PPO, RPP = "--advantage-estimator ppo", "--advantage-estimator reinforce_plus_plus --normalize-advantages"
TEACHER = "--opd-type sglang --rm-url http://h"
LORA = "--lora-rank 4 --target-modules q_proj"
OPD = f"--use-opd {TEACHER}"
FAST = [
    ("--offload-train --rollout-num-gpus 1", resolved, "offload_train", True),
    ("--no-offload-train --colocate", resolved, "offload_train", False),
    ("--offload", resolved, "offload_rollout", True),
    ("--offload-rollout-level weight", offloaded, "tags", ["cuda_graph", "weights"]),
    ("--num-rollout 5", resolved, "num_rollout", 5),
    ("--num-epoch 2", resolved, "num_rollout", 16),
    ("--rollout-batch-size 4", resolved, "num_rollout", 16),
    ("--n-samples-per-prompt 2", resolved, "global_batch_size", 16),
    ("--global-batch-size 8", resolved, "num_steps_per_rollout", 4),
    ("--num-steps-per-rollout 4", resolved, "global_batch_size", 8),
    ("--seed 5", engine, "random_seed", 6),
    ("--model-name Qwen3-4B", resolved, "qk_layernorm", True),
    ("--eps-clip 0.3", resolved, "eps_clip_high", 0.3),
    ("--use-fault-tolerance --rollout-health-check-interval 7", health, "probe_interval_s", 7.0),
    ("--rollout-health-check-interval 7 --use-fault-tolerance", health, "probe_interval_s", 7.0),
    ("--rollout-health-check-timeout 8 --use-fault-tolerance", health, "probe_timeout_s", 8.0),
    ("--rollout-health-check-first-wait 9 --use-fault-tolerance", health, "first_wait_s", 9.0),
    ("--sglang-router-policy random", router, "router_policy", "random"),
    ("--sglang-router-request-timeout-secs 9", router, "router_request_timeout_secs", 9),
    (f"{EVAL} --n-samples-per-eval-prompt 3", evaluation, "n_samples_per_eval_prompt", 3),
    (f"{EVAL} --eval-max-response-len 7", evaluation, "max_response_len", 7),
    (f"{EVAL} --eval-temperature 0.25", evaluation, "temperature", 0.25),
    (f"{EVAL} --eval-top-p 0.25", evaluation, "top_p", 0.25),
    (f"{EVAL} --eval-top-k 7", evaluation, "top_k", 7),
    (f"{EVAL} --eval-max-prompt-len 9", evaluation, "max_prompt_len", 9),
    (f"{EVAL} --eval-min-new-tokens 2", evaluation, "min_new_tokens", 2),
    (f"{EVAL} --eval-max-context-len 99", evaluation, "max_context_len", 99),
    (f"{EVAL} --eval-tool-key t", evaluation, "tool_key", "t"),
    ("--loss-type sft_loss", resolved, "compute_advantages_and_returns", False),
    ("--chat-template-path t", resolved, "sglang_chat_template", "/home/me/t"),
    ("--rollout-seed 7", seeded, "sampling_seed", 9),
    ("--log-reward-category kind", categories, "error_cat/a", 0.5),
    (f"{EVAL} --skip-eval-before-train", loop, "evaluates first", False),
    ("--log-interval 3", loop, "told", [0, 3, 6, 7]),
    ("--use-wandb", trackers, "chosen", ["wandb"]),
    ("--use-mlflow", trackers, "chosen", ["mlflow"]),
    ("--use-tensorboard", trackers, "chosen", ["tensorboard"]),
    ("--use-prometheus", trackers, "chosen", ["prometheus"]),
    ("--wandb-project p --use-wandb", trackers, "wandb_project", "p"),
    ("--wandb-group g --use-wandb", trackers, "wandb_group", "g"),
    ("--wandb-mode offline --use-wandb", trackers, "wandb_mode", "offline"),
    ("--disable-wandb-random-suffix --use-wandb", trackers, "wandb_random_suffix", False),
    ("--wandb-dir d --use-wandb", trackers, "wandb_dir", "/home/me/d"),
    ("--wandb-host https://h --use-wandb", trackers, "wandb_host", "https://h"),
    ("--wandb-team t --use-wandb", trackers, "wandb_team", "t"),
    ("--wandb-run-id i --use-wandb", trackers, "wandb_run_id", "i"),
    ("--wandb-run-name n --use-wandb", trackers, "wandb_run_name", "n"),
    ("--mlflow-run-name n --use-mlflow", trackers, "mlflow_run_name", "n"),
    ("--mlflow-tracking-uri sqlite:///x --use-mlflow", trackers, "mlflow_tracking_uri", "sqlite:///x"),
    ("--mlflow-experiment-name e --use-mlflow", trackers, "mlflow_experiment_name", "e"),
    ("--mlflow-run-id i --use-mlflow", trackers, "mlflow_run_id", "i"),
    ("--tensorboard-log-interval 4", orders, "points", [0, 4]),
    ("--tensorboard-queue-size 7", orders, "limit", 7),
    ("--log-multi-turn", measured, "turns", True),
    ("--log-correct-samples", measured, "correct", True),
    (f"{EVAL} --ci-metric-checker-key eval/x --ci-metric-checker-threshold 0.9", verdict, "reached", False),
    (f"{EVAL} --ci-metric-checker-threshold 0.9 --ci-metric-checker-key eval/x", verdict, "reached", False),
    (LORA, adapters, "rank", 4),
    (f"--lora-alpha 2 {LORA}", adapters, "scaling", 0.5),
    (f"--lora-dropout 0.5 {LORA}", adapters, "dropout", 0.5),
    ("--run-dir here", resolved, "run_dir", "/home/me/here"),
    ("--disable-compute-advantages-and-returns", resolved, "compute_advantages_and_returns", False),
]
"""Command line behind the recipe, observer, key, value: without torch."""
WARM = [
    ("--distributed-timeout-minutes 3", process_group, "minutes", 3.0),
    ("--eval-function-path support.tiny_models.tiny_model", loaded, "evaluates", "support.tiny_models.tiny_model"),
    ("--load-debug-rollout-data-subsample 0.5", read_again, "groups", 2),
    ("--rollout-max-response-len 9", answers, "max_new_tokens", 9),
    ("--rollout-temperature 0.5", answers, "temperature", 0.5),
    ("--rollout-top-p 0.5", answers, "top_p", 0.5),
    ("--rollout-top-k 5", answers, "top_k", 5),
    ("--rollout-stop a b", answers, "stop", ["a", "b"]),
    ("--rollout-stop-token-ids 7", answers, "stop_token_ids", [7]),
    ("--rollout-skip-special-tokens", answers, "skip_special_tokens", True),
    ("--sglang-server-concurrency 3", answers, "at once", 6),
    ("--rollout-temperature 0.5", loss, "temperature", 0.5),
    ("--offload-train-disk-chunk-mb 3 --offload-train --offload-train-target disk", sleeping, "bytes", 3 << 20),
    ("--log-probs-chunk-size 7", loss, "chunk_size", 7),
    ("--kl-loss-type k3 --use-kl-loss", loss, "kl_loss_type", "k3"),
    ("--entropy-coef 0.5", loss, "entropy_coef", 0.5),
    ("--eps-clip 0.3", loss, "eps_clip", 0.3),
    ("--eps-clip-high 0.3", loss, "eps_clip_high", 0.3),
    ("--eps-clip-c 3", loss, "eps_clip_c", 3.0),
    ("--use-tis", loss, "use_tis", True),
    ("--get-mismatch-metrics", loss, "get_mismatch_metrics", True),
    ("--calculate-per-token-loss", loss, "per_token", True),
    ("--use-unbiased-kl --use-kl-loss", loss, "use_unbiased_kl", True),
    ("--use-rollout-logprobs", loss, "use_rollout_log_probs", True),
    ("--skip-actor-forward-only", loss, "skip_actor_forward_only", True),
    (f"{TEN} --lr-decay-style linear", curve, "lr", [round(1 - step / 10, 6) for step in range(10)]),
    (f"{TEN} --lr-warmup-iters 5", curve, "lr", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]),
    (f"{TEN} --lr-warmup-iters 2 --lr-warmup-init 0.5", curve, "lr", [0.5, 0.75, *[1.0] * 8]),
    (f"{TEN} --lr-warmup-fraction 0.4", curve, "lr", [0.0, 0.25, 0.5, 0.75, *[1.0] * 6]),
    (
        f"{TEN} --lr-decay-style linear --lr-decay-iters 4",
        *(curve, "lr", [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    ),
    (
        f"{TEN} --lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-wsd-decay-style linear",
        *(curve, "lr", [1.0] * 7 + [0.75, 0.5, 0.25]),
    ),
    (
        f"{TEN} --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1",
        *(curve, "wd", [round(step / 10, 6) for step in range(10)]),
    ),
    ("--advantage-estimator gspo", loss, "per_sequence", True),
    ("--use-opsm", loss, "use_opsm", True),
    ("--opsm-delta 0.5 --use-opsm", loss, "opsm_delta", 0.5),
    (f"--value-clip 0.5 {PPO}", loss, "value_clip", 0.5),
    (f"--kl-coef 0.5 {RPP}", advantages, "kl_coef", 0.5),
    (f"--gamma 0.5 {PPO}", advantages, "gamma", 0.5),
    (f"--lambd 0.5 {PPO}", advantages, "lambd", 0.5),
    (f"--use-opd {TEACHER}", advantages, "use_opd", True),
    (f"--opd-kl-coef 0.5 {OPD}", advantages, "opd_kl_coef", 0.5),
    (f"--critic-load L {PPO}", critic, "load", "/home/me/L"),
    (f"--critic-save S {PPO} --save A", critic, "save", "/home/me/S"),
    (f"--critic-lr 0.5 {PPO}", critic, "lr", 0.5),
    (f"--critic-lr-warmup-iters 3 {PPO}", critic, "lr_warmup_iters", 3),
    ("--make-vocab-size-divisible-by 300", padded, "rows", 1200),
]
"""The same, in a process that has torch and megatron-core."""

TOLD = {
    "--num-layers 27": FACTS,
    "--hidden-size 1": FACTS,
    "--ffn-hidden-size 1": FACTS,
    "--num-attention-heads 1": FACTS,
    "--num-query-groups 1": FACTS,
    "--kv-channels 1": FACTS,
    "--vocab-size 1": FACTS,
    "--max-position-embeddings 1": FACTS,
    "--norm-epsilon 1": FACTS,
    "--rotary-base 1": FACTS,
    "--rope-scaling-factor 2": FACTS,
    "--use-rope-scaling": FACTS,
    "--add-qkv-bias": FACTS,
    "--untie-embeddings-and-output-weights": FACTS,
    "--seq-length 99999": FACTS,
    "--num-experts 8": FACTS,
    "--moe-ffn-hidden-size 8": FACTS,
    "--moe-router-topk 2": FACTS,
    "--moe-layer-freq 1": FACTS,
    "--moe-router-pre-softmax": FACTS,
    "--qk-layernorm": with_directory("M", replace(MODEL, config=LLAMA)),
    "--distributed-backend gloo": GPUS,
    f"--critic-num-nodes 2 {PPO}": FACTS,
    f"--critic-num-gpus-per-node 1 {PPO}": FACTS,
    "--sglang-router-ip h": FACTS,
}
"""Flags that are checks: a value that does not fit is told with their name."""

OWN = {
    "--exit-on-missing-checkpoint": "test_a_missing_checkpoint_can_be_an_error",
    "--sglang-router-port": "test_a_router_that_runs_already_is_found_at_its_port",
}
"""Tests of this module."""


def values_of(flags):
    return config(flags, facts=with_directory("L", CHECKPOINT, replace(FACTS, **NAMED)))


@pytest.mark.parametrize(("flags", "observe", "key", "value"), FAST, ids=[f"{row[0]}: {row[2]}" for row in FAST])
def test_a_value_arrives(flags, observe, key, value):
    assert observe(values_of(flags))[key] == value
    plain = observe(values_of(EVAL if EVAL in flags else ""))
    assert key not in plain or plain[key] != value or key in {"qk_layernorm", "offload_train", "offload_rollout"}


@pytest.fixture(scope="module")
def ranks():
    with warm_process():
        yield


def observed(cases):
    return [globals()[name](values)[key] for name, key, values in cases]


@pytest.mark.full
def test_values_arrive_where_torch_is(ranks):
    cases = [(observe.__name__, key, values_of(flags)) for flags, observe, key, _ in WARM]
    plain = [(name, key, values_of(TEN if name == "curve" else "")) for name, key, _ in cases]
    found, without = (run_ranks(1, observed, part, distributed=False)[0] for part in (cases, plain))
    assert dict(zip([row[0] for row in WARM], found, strict=True)) == {row[0]: row[3] for row in WARM}
    assert [row[0] for row, value in zip(WARM, without, strict=True) if value == row[3]] == []


@pytest.mark.parametrize("flags", TOLD)
def test_what_does_not_fit_is_told(flags):
    problems = {problem.flag for problem in outcome(flags, facts=TOLD[flags]).problems}
    assert flags.split()[0] in problems


def test_a_missing_checkpoint_can_be_an_error():
    facts = with_directory("E", DirectoryFacts(exists=True))
    assert outcome("--load E", facts=facts).problems == ()
    (problem,) = outcome("--load E --exit-on-missing-checkpoint", facts=facts).problems
    assert (problem.flag, "--exit-on-missing-checkpoint" in problem.what) == ("--load", True)


def test_a_router_that_runs_already_is_found_at_its_port():
    found = config("--sglang-router-ip h --sglang-router-port 7")
    assert (found["sglang_router_ip"], found["sglang_router_port"]) == ("h", 7)


def observed_flags():
    """The first flag of each row, behind what several rows have in common; of a curve all that shape it."""
    found = {words.split()[0] for words in (*TOLD, *OWN)}
    for flags, observe, *_ in (*FAST, *WARM):
        own = [word for word in flags.removeprefix(EVAL).removeprefix(TEN).split() if word.startswith("--")]
        found |= set(own if observe is curve else own[:1])
    return found


def test_every_honoured_flag_has_a_case():
    cases = {*observed_flags(), *shown()}
    known = {name for flag in table().flags if cases & set(flag.names) for name in flag.names}
    honoured = [flag.name for flag in table().flags if flag.only is None and not flag.older]
    assert [name for name in honoured if name not in known] == [], __doc__


def test_every_case_is_of_a_flag_that_is_honoured():
    assert [name for name in (*observed_flags(), *shown()) if name not in table().by_name] == []
    assert [name for name in shown() if table().by_name[name].only is not None] == []


@pytest.mark.parametrize("name", shown())
def test_the_test_that_shows_it_is_there_and_names_it(name):
    file, _, test = shown()[name].partition("::")
    text = (TESTS / file).read_text()
    assert re.search(rf"def {test}\b", text)
    assert table().by_name[name].dest in text or name in text
