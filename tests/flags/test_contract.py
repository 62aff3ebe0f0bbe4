"""No flag of the documented command line is refused because its feature is missing: each is walked with each of its
values, on a CPU and on GPUs, beside what it needs. What is refused nevertheless is listed, with the reason."""

from dataclasses import replace

import pytest
from support.flag_cases import CHECKPOINT, FACTS, GPUS, MODEL, RECIPE, outcome
from support.flag_contract import CHOICES, CONTRACT, NOT_BUILT

from miles.flags.flag import TAKES_NO_VALUE, Flag
from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table

ROWS = [line.split(" | ") for line in CONTRACT.splitlines()]
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
MIMO = {
    "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True, "num_nextn_predict_layers": 1,
}  # fmt: skip
VALUES = {
    "--actor-num-nodes": ["1"],
    "--hf-checkpoint": ["M"],
    "--prompt-data": ["D"],
    "--ref-load": ["M", "C"],
    "--load": ["C"],
    "--model-name": ["qwen3-4B"],
    "--spec": ["json loads"],
    "--num-steps-per-rollout": ["1", "2"],
    "--global-batch-size": ["32"],
    "--over-sampling-batch-size": ["16"],
    "--rollout-top-k": ["20"],
    "--rollout-stop": ["END STOP"],
    "--rollout-stop-token-ids": ["7 9"],
    "--eval-prompt-data": ["held D"],
    "--fsdp-cpu-backend": ["gloo", "mpi"],
    "--rollout-num-gpus": ["2"],
    "--min-lr": ["1e-7"],
    "--rm-type": ["math", "dapo", "deepscaler", "f1", "gpqa", "ifbench", "random"],
    "--rm-url": ["http://graders:8000/grade"],
    "--sglang-router-ip": ["10.0.0.1"],
    "--mtp-num-layers": ["1"],
    "--profile-target": ["train_overall", "train_actor train_log_probs"],
    "--load-debug-rollout-data": ["D"],
    "--custom-rm-path": ["json.loads"],
    "--dynamic-sampling-filter-path": ["json.loads"],
    "--buffer-filter-path": ["json.loads"],
    "--rollout-sample-filter-path": ["json.loads"],
    "--custom-rollout-log-function-path": ["json.loads"],
    "--custom-eval-rollout-log-function-path": ["json.loads"],
}  # fmt: skip
"""Where those of the kind, or of the contract's list, are not what it takes."""
NEEDS = {
    "--save-interval": "--save S",
    "--eval-interval": "--eval-prompt-data held D",
    "--n-samples-per-eval-prompt": "--eval-prompt-data held D",
    "--eval-max-response-len": "--eval-prompt-data held D",
    "--eval-temperature": "--eval-prompt-data held D",
    "--eval-top-p": "--eval-prompt-data held D",
    "--use-dynamic-batch-size": "--max-tokens-per-gpu 4096",
    "--recompute-granularity full": "--recompute-method uniform --recompute-num-layers 1",
    "--recompute-method": "--recompute-granularity full --recompute-num-layers 1",
    "--recompute-num-layers": "--recompute-granularity full --recompute-method block",
    "--gradient-checkpointing": "--train-backend fsdp",
    "--fsdp-cpu-offload": "--train-backend fsdp",
    "--fsdp-cpu-backend": "--train-backend fsdp",
    "--attn-implementation": "--train-backend fsdp",
    "--use-pytorch-profiler": "--train-backend fsdp",
    "--advantage-estimator on_policy_distillation": "--use-opd --opd-type megatron --opd-teacher-load M",
    "--advantage-estimator reinforce_plus_plus": "--normalize-advantages",
    "--advantage-estimator reinforce_plus_plus_baseline": "--normalize-advantages",
    "--use-kl-loss": "--ref-load M",
    "--sglang-router-ip": "--sglang-router-port 3000",
    "--sequence-parallel": "--tensor-model-parallel-size 2",
    "--enable-mtp-training": "--mtp-num-layers 1",
    "--mtp-loss-scaling-factor": "--mtp-num-layers 1 --enable-mtp-training",
    "--rm-url": "--rm-type remote_rm",
    "--rm-type dapo": "--reward-key score",
    "--expert-tensor-parallel-size": "--tensor-model-parallel-size 2 --sequence-parallel",
    "--overlap-cpu-optimizer-d2h-h2d": "--optimizer-cpu-offload",
}
MODELS = {
    **dict.fromkeys(
        (
            "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--use-routing-replay",
            "--use-rollout-routing-replay",
        ),
        EXPERTS,
    ),
    **dict.fromkeys(("--mtp-num-layers", "--enable-mtp-training", "--mtp-loss-scaling-factor"), MIMO),
}  # fmt: skip
CANNOT = {
    ("cpu", "--attn-implementation flash_attention_2"): "needs CUDA",
    ("cpu", "--fsdp-cpu-backend mpi"): "gloo is PyTorch's backend",
    ("gpu", "--fsdp-cpu-backend mpi"): "gloo is PyTorch's backend",
    ("cpu", "--use-precision-aware-optimizer"): "Transformer Engine",
    ("gpu", "--use-precision-aware-optimizer"): "Transformer Engine",
}
"""What the device, or a package that is not there, cannot do, and what the refusal says of it."""


def cases():
    found = []
    for name, kind, _ in ROWS:
        flag = table().by_name[name]
        if flag.kind in TAKES_NO_VALUE:
            found.append(name)
            continue
        plain = {"int": "2", "float": "0.5", "path": "S", "str": "x"}.get(kind.rstrip("+"))
        values = VALUES.get(name) or sorted(CHOICES.get(name, ())) or [plain]
        found += [f"{name} {value}" for value in values]
    return found


def facts_of(device, name):
    facts = FACTS if device == "cpu" else GPUS
    model = replace(MODEL, config={**MODEL.config, **MODELS.get(name, {})})
    return replace(facts, directories={**facts.directories, "M": model, "C": CHECKPOINT})


def told_of(case, device):
    name = case.partition(" ")[0]
    needs = NEEDS.get(case, NEEDS.get(name, ""))
    without = ("--colocate",) if name == "--rollout-num-gpus" else ()
    resolved = outcome(f"{needs} {case}", facts=facts_of(device, name), without=without)
    return {problem.flag: " ".join(problem.lines()) for problem in resolved.problems}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("case", cases())
def test_a_flag_of_the_contract_is_honoured_unless_the_device_cannot(case, device):
    told, name = told_of(case, device), case.partition(" ")[0]
    reason = CANNOT.get((device, case))
    if reason is None:
        assert told == {}
        return
    assert list(told) == [name]
    assert reason in told[name]
    assert "not built" not in told[name]


def test_the_walk_has_every_flag_and_the_list_names_what_is_walked():
    walked = cases()
    assert {case.partition(" ")[0] for case in walked} == {name for name, *_ in ROWS}
    assert {case for _, case in CANNOT} <= set(walked)
    assert set(NOT_BUILT) == {case.partition(" ")[0] for _, case in CANNOT} - {"--attn-implementation"}


OFFLOADS = (
    "--offload", "--offload-train", "--no-offload-train", "--offload-rollout", "--no-offload-rollout",
    "--offload-rollout-level kv_cache", "--offload-rollout-level kv_cache weight", "--offload-train-target cpu",
    "--offload-train-target disk", "--offload-train-target disk --offload-train-disk-dir S",
    "--optimizer-cpu-offload", "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d",
    "--train-backend fsdp --fsdp-cpu-offload",
)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("case", OFFLOADS)
def test_every_kind_of_offload_is_taken(case, device):
    assert told_of(case, device) == {}


def test_engines_are_not_deterministic_on_a_cpu_and_the_refusal_says_what_is():
    name = "--sglang-enable-deterministic-inference"
    known = table().extended([Flag((name,), "sglang_enable_deterministic_inference", "switch", False, source="sglang")])
    words = [*RECIPE.split(), "--deterministic-mode", name]
    [problem] = resolve(parse(words, known), known, FACTS).problems
    assert problem.flag == name
    assert "kernels for it on GPUs" in problem.what
    assert "--load-debug-rollout-data" in problem.advice
    on_gpus = resolve(parse(words, known), known, GPUS)
    assert not on_gpus.problems
    assert on_gpus.config["sglang_enable_deterministic_inference"] is True
