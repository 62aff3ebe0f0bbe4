"""Flags of the trainer: what goes together, what one of the backends cannot do, and what a run on a CPU makes of it."""

import pytest
from support.flag_cases import FACTS, GPUS, config, outcome, problems

FSDP = "--train-backend fsdp"


@pytest.mark.parametrize(
    ("words", "flag", "text"),
    [
        (f"--qkv-format bshd {FSDP}", "--qkv-format", "the FSDP backend packs its batches"),
        (
            "--qkv-format bshd --use-dynamic-batch-size --max-tokens-per-gpu 99",
            "--qkv-format",
            "--use-dynamic-batch-size",
        ),
        (f"--spec a b {FSDP}", "--spec", "those of transformers"),
        (f"--custom-model-provider-path json.loads {FSDP}", "--custom-model-provider-path", "those of transformers"),
        ("--spec only.one", "--spec", "a module and a function"),
        ("--dp-replicate-size 2", "--dp-replicate-size", "only the FSDP backend"),
        (f"--dp-replicate-size 3 {FSDP}", "--dp-replicate-size", "a divisor of 2"),
        ("--no-keep-fp32-master", "--no-keep-fp32-master", "keeps them"),
        ("--save-trigger-sentinel S", "--save-trigger-sentinel", "Give --save, too"),
        (
            "--custom-megatron-post-save-hook-path json.dumps",
            "--custom-megatron-post-save-hook-path",
            "Give --save, too",
        ),
        ("--debug-disable-optimizer --reset-optimizer-states", "--reset-optimizer-states", "leaves none"),
        (
            "--debug-skip-weight-update --check-weight-update-equal",
            "--check-weight-update-equal",
            "--debug-skip-weight-update",
        ),
        ("--skip-actor-forward-only --use-rollout-entropy", "--use-rollout-entropy", "no pass"),
        (
            "--skip-actor-forward-only --custom-megatron-before-log-prob-hook-path json.loads",
            "--custom-megatron-before-log-prob-hook-path",
            "no pass",
        ),
        ("--keep-old-actor --use-rollout-logprobs", "--keep-old-actor", "no pass over old log-probs"),
        ("--keep-old-actor --partial-rollout", "--keep-old-actor", "--mask-offpolicy-in-partial-rollout"),
        ("--keep-old-actor --use-fault-tolerance", "--keep-old-actor", "--use-rollout-logprobs"),
        ("--keep-old-actor --use-routing-replay", "--keep-old-actor", "for each weight version"),
        ("--keep-old-actor --debug-skip-weight-update", "--keep-old-actor", "none of the trainer's weights"),
        ("--use-kl-loss --ref-update-interval 0", "--ref-update-interval", "1 or more"),
        (f"--optimizer-cpu-offload {FSDP}", "--optimizer-cpu-offload", "--fsdp-cpu-offload"),
        ("--optimizer-cpu-offload --optimizer sgd", "--optimizer-cpu-offload", "with --optimizer adam"),
        ("--use-precision-aware-optimizer", "--use-precision-aware-optimizer", "Transformer Engine"),
        ("--profile", "--profile", "nsys"),
        ("--use-pytorch-profiler --profile-step-start 12", "--profile-step-end", "above 12"),
        ("--use-pytorch-profiler --profile-ranks 0 2", "--profile-ranks", "0 to 1"),
        ("--use-pytorch-profiler --profile-target train_all", "--profile-target", "train_log_probs"),
        ("--record-memory-history", "--record-memory-history", "--memory-recorder memray"),
        ("--memory-snapshot-num-steps 0", "--memory-snapshot-num-steps", "1 or more"),
        ("--use-fault-tolerance --save S --no-save-optim", "--no-save-optim", "must have everything"),
        ("--use-fault-tolerance --save S --no-save-rng", "--no-save-rng", "must have everything"),
        ("--use-fault-tolerance --recovery-interval 0", "--recovery-interval", "1 or more"),
        ("--use-fault-tolerance --recovery-stop-timeout 0", "--recovery-stop-timeout", "above 0"),
        ("--trainer-heartbeat-checker-timeout 0", "--trainer-heartbeat-checker-timeout", "above 0"),
    ],
)
def test_what_cannot_be_done_is_told_by_name(words, flag, text):
    found = problems(words)
    assert any(text in problem for name, problem in found.items() if flag in name or name in flag), found


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--qkv-format bshd --micro-batch-size 2", {"qkv_format": "bshd"}),
        (f"--dp-replicate-size 2 {FSDP}", {"dp_replicate_size": 2}),
        (f"--no-keep-fp32-master {FSDP}", {"keep_fp32_master": False}),
        ("--keep-fp32-master", {"keep_fp32_master": True}),
        ("--debug-disable-optimizer", {"no_save_optim": True, "no_load_optim": True}),
        ("--data-pad-size-multiplier 64", {"data_pad_size_multiplier": 64}),
        ("", {"data_pad_size_multiplier": 1}),
        ("--spec a b", {"spec": ["a", "b"]}),
        ("--use-pytorch-profiler --profile", {"profile": True}),
        ("--record-memory-history --memory-recorder memray", {"memory_recorder": "memray"}),
    ],
)
def test_what_can_be_done_is_in_the_config(words, changed):
    found = config(words)
    assert {name: found[name] for name in changed} == changed


def test_on_a_gpu_batches_are_filled_up_and_torch_records():
    found = config("--record-memory-history --profile", facts=GPUS)
    assert found["data_pad_size_multiplier"] == 128
    assert found["memory_recorder"] == "torch"


def test_loading_with_little_memory():
    """--low-memory-resume: on a CPU it is what is done, on a GPU it is not built."""
    assert any("--low-memory-resume" in notice for notice in outcome("--low-memory-resume", facts=FACTS).notices)
    assert "--low-memory-resume" in problems("--low-memory-resume", facts=GPUS)


def test_masters_that_are_not_there_are_told():
    assert any("--no-keep-fp32-master" in notice for notice in outcome(f"--no-keep-fp32-master {FSDP}").notices)


def test_on_a_cpu_the_optimizer_is_in_host_memory_anyway():
    found = outcome("--optimizer-cpu-offload")
    assert [notice for notice in found.notices if "--optimizer-cpu-offload has no effect" in notice]
    assert found.config["optimizer_cpu_offload"] is False
    assert config("--optimizer-cpu-offload", facts=GPUS)["optimizer_cpu_offload"] is True


COLOCATED = f"{FSDP} --fsdp-cpu-offload --colocate --actor-num-gpus-per-node 4"


@pytest.mark.parametrize(
    ("words", "flag", "text"),
    [
        (f"{COLOCATED} --offload-train-target disk", "--offload-train-target", "--fsdp-cpu-offload"),
        (f"{FSDP} --fsdp-cpu-backend nccl", "--fsdp-cpu-backend", "gloo"),
        (f"{FSDP} --attn-implementation magic", "--attn-implementation", "flash_attention_2, sdpa or eager"),
        ("--fsdp-cpu-offload", "--fsdp-cpu-offload", "only the FSDP backend"),
        ("--gradient-checkpointing", "--gradient-checkpointing", "--recompute-granularity"),
        ("--attn-implementation sdpa", "--attn-implementation", "--attention-backend"),
    ],
)
def test_what_fsdp_on_gpus_cannot_do_and_what_it_alone_can(words, flag, text):
    found = problems(words, facts=GPUS)
    assert text in found[flag], found


def test_what_fsdp_does_anyway_and_what_goes_with_shards_on_the_host():
    assert config(f"{FSDP} --fsdp-state-dict-cpu-offload", facts=GPUS)["fsdp_state_dict_cpu_offload"]
    found = config(f"{COLOCATED} --offload-train-target cpu", facts=GPUS)
    assert found["fsdp_cpu_offload"] and found["offload_train"]
    # Where nobody sleeps, the target is no matter.
    config(f"{FSDP} --fsdp-cpu-offload --no-offload-train --offload-train-target disk", facts=GPUS)
