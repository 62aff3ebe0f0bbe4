"""Rules: parts, device, world size, engines, room."""

from dataclasses import replace

import pytest
from support.flag_cases import FACTS, GPUS, RECIPE, config, outcome, problems

from miles.flags.flag import grouped, switch
from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table

APART = {"without": ["--colocate"]}


def subset(flags="", *keys, **more):
    found = config(flags, **more)
    return {key: found[key] for key in keys}


def test_a_recipe_resolves():
    found = config()
    assert found["world_size"] == found["dp_size"] == 2
    assert (found["rollout_num_gpus"], found["rollout_num_engines"], found["sglang_tp_size"]) == (2, 2, 1)
    assert (found["offload_train"], found["offload_rollout"]) == (True, True)
    assert (found["device"], found["params_dtype"], found["bf16"]) == ("cpu", "float32", False)
    assert found["start_rollout_id"] is None
    assert found["run_dir"] == "/runs/new"


def test_every_value_is_plain_json():
    import json

    found = config()
    assert json.loads(json.dumps(found)) == found


def test_an_offload_that_was_typed_wins_over_colocate():
    assert subset("--no-offload-train", "offload_train", "offload_rollout") == {
        "offload_train": False,
        "offload_rollout": True,
    }
    assert subset("--offload --rollout-num-gpus 1", "offload_train", **APART) == {"offload_train": True}


def test_colocated_engines_have_the_trainers_devices_whatever_was_typed():
    resolved = outcome("--rollout-num-gpus 7")
    assert resolved.config["rollout_num_gpus"] == 2
    assert any("--rollout-num-gpus 7 is ignored" in notice for notice in resolved.notices)


def test_engines_of_several_ranks():
    flags = "--actor-num-gpus-per-node 4 --rollout-num-gpus-per-engine 2"
    assert subset(flags, "rollout_num_engines", "sglang_tp_size") == {"rollout_num_engines": 2, "sglang_tp_size": 2}
    assert (
        "cannot be divided into engines of 3"
        in problems("--rollout-num-gpus-per-engine 3")["--rollout-num-gpus-per-engine"]
    )


def test_disaggregated_on_a_cpu_has_one_engine_unless_told():
    resolved = outcome(**APART)
    assert resolved.config["rollout_num_engines"] == 1
    assert any("one engine" in notice for notice in resolved.notices)
    assert config("--rollout-num-gpus 3", **APART)["rollout_num_engines"] == 3


def test_disaggregated_on_gpus_takes_what_the_trainer_leaves():
    assert config(facts=GPUS, **APART)["rollout_num_gpus"] == 6
    assert config("--rollout-num-gpus-per-engine 4", facts=GPUS, **APART)["rollout_num_engines"] == 1
    found = problems("--actor-num-gpus-per-node 8", facts=GPUS, **APART)
    assert "leaves 0, an engine needs 1" in found["--rollout-num-gpus"]


def test_more_gpus_than_there_are():
    found = problems("--actor-num-gpus-per-node 16", facts=GPUS)
    assert "need 16 GPUs, this machine offers 8" in found["--actor-num-gpus-per-node"]
    found = problems("--num-gpus-per-node 4 --rollout-num-gpus 4", facts=GPUS, **APART)
    assert "need 6 GPUs, this machine offers 4" in found["--actor-num-gpus-per-node"]
    assert "shows 8 GPUs" in problems("--num-gpus-per-node 9", facts=GPUS)["--num-gpus-per-node"]


def test_cpu_slots_are_adjusted_and_shared_cores_are_told():
    resolved = outcome("--actor-num-gpus-per-node 12 --global-batch-size 12 --rollout-batch-size 3")
    assert resolved.config["cpu_slots"] == 12
    assert any("12 ranks and engines share 4 CPU cores" in notice for notice in resolved.notices)
    assert config()["cpu_slots"] == 8


def test_this_machine_is_one_node():
    assert "this machine alone" in problems("--actor-num-nodes 2")["--actor-num-nodes"]
    assert "no machine is named" in problems("--launcher ssh")["--launcher"]
    assert config("--launcher local")["launcher"] == config()["launcher"] == "local"
    assert config()["num_nodes"] == 1
    assert config()["machines"] == []


def test_tensor_parallel_makes_data_parallel_smaller():
    flags = "--tensor-model-parallel-size 2 --actor-num-gpus-per-node 4"
    assert subset(flags, "world_size", "dp_size") == {"world_size": 4, "dp_size": 2}
    found = problems("--tensor-model-parallel-size 4")
    assert "2 ranks cannot be divided into groups of 4" in found["--tensor-model-parallel-size"]


def test_rollout_only_has_no_trainer():
    found = config("--debug-rollout-only")
    assert (found["world_size"], found["dp_size"], found["colocate"]) == (0, 1, False)
    assert found["rollout_num_engines"] == 1
    assert found["offload_train"] is False


def test_train_only_has_no_engines():
    found = config("--debug-train-only")
    assert (found["rollout_num_gpus"], found["rollout_num_engines"]) == (0, 0)
    assert config("--load-debug-rollout-data x/{rollout_id}.pt --num-rollout 3")["debug_train_only"] is True


def test_neither_is_refused():
    assert "--debug-train-only" in problems("--debug-rollout-only --debug-train-only")["--debug-rollout-only"]
    flags = "--debug-rollout-only --load-debug-rollout-data x"
    assert "--load-debug-rollout-data" in problems(flags)["--debug-rollout-only"]


class TestSupervised:
    flags = "--loss-type sft_loss"

    def test_it_needs_neither_reward_nor_length_nor_engines(self):
        resolved = outcome(self.flags, without=["--rm-type", "--rollout-max-response-len"])
        assert not resolved.problems
        assert resolved.config["rollout_function_path"] == "miles.rollout.sft_rollout.generate_rollout"
        assert resolved.config["debug_train_only"] is True
        assert resolved.config["compute_advantages_and_returns"] is False
        assert any("none are started" in notice for notice in resolved.notices)

    def test_with_evaluation_it_has_engines(self):
        found = config(f"{self.flags} --eval-interval 2 --eval-prompt-data t D")
        assert found["debug_train_only"] is False
        assert found["rollout_num_engines"] == 2

    def test_a_function_of_the_users_keeps_the_engines(self):
        assert config(f"{self.flags} --rollout-function-path my.rollout")["debug_train_only"] is False

    def test_it_generates_nothing(self):
        assert "--debug-rollout-only" in problems(f"{self.flags} --debug-rollout-only")


class TestDevice:
    def test_gpus_are_used_if_torch_can(self):
        assert subset("", "device", "params_dtype", "bf16", facts=GPUS) == {
            "device": "cuda",
            "params_dtype": "bfloat16",
            "bf16": True,
        }
        resolved = outcome(facts=replace(GPUS, torch_has_cuda=False))
        assert resolved.config["device"] == "cpu"
        assert any("8 GPUs are not used" in notice for notice in resolved.notices)

    def test_a_driver_that_fails_is_told(self):
        assert any("driver" in note for note in outcome(facts=replace(FACTS, gpu_fault="driver: broken")).notices)

    def test_cuda_that_is_not_there_is_refused(self):
        assert "shows no GPU" in problems("--device cuda")["--device"]
        assert "CPU build" in problems("--device cuda", facts=replace(FACTS, gpus=1))["--device"]

    def test_a_cpu_can_be_chosen_beside_gpus(self):
        assert config("--device cpu", facts=GPUS)["device"] == "cpu"

    def test_bf16_on_a_cpu_is_a_choice(self):
        assert config("--bf16")["params_dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("flags", "dest", "becomes"),
        [("", "distributed_backend", "gloo"), ("--train-backend fsdp", "attn_implementation", "sdpa")],
    )
    def test_a_default_that_a_cpu_cannot_do_becomes_what_it_can(self, flags, dest, becomes):
        resolved = outcome(flags)
        assert not resolved.problems
        assert resolved.config[dest] == becomes
        assert any(f"is {becomes}" in notice for notice in resolved.notices)

    def test_defaults_stay_on_cuda(self):
        assert config(facts=GPUS)["distributed_backend"] == "nccl"
        assert config("--train-backend fsdp", facts=GPUS)["attn_implementation"] == "flash_attention_2"

    @pytest.mark.parametrize(
        "flags",
        [
            "--distributed-backend nccl",
            "--train-backend fsdp --attn-implementation flash_attention_2",
            "--attention-backend flash",
        ],
    )
    def test_the_same_typed_is_refused_by_name(self, flags):
        name = [word for word in flags.split() if word.startswith("--")][-1]
        assert "needs CUDA" in problems(flags)[name]

    def test_process_groups_of_gpus_are_nccls(self):
        assert "nccl" in problems("--distributed-backend gloo", facts=GPUS)["--distributed-backend"]
        assert config("--attention-backend flash", facts=GPUS)["attention_backend"] == "flash"


class TestBackends:
    def test_fsdp_is_data_parallel_only(self):
        found = problems("--train-backend fsdp --tensor-model-parallel-size 2")
        assert "data parallel only" in found["--tensor-model-parallel-size"]
        assert config("--train-backend fsdp")["dp_size"] == 2

    @pytest.mark.parametrize(
        "flag",
        [
            "--recompute-granularity selective",
            "--use-checkpoint-opt-param-scheduler",
            "--attention-backend auto",
        ],
    )
    def test_what_only_megatron_has(self, flag):
        config(flag)
        assert "only the Megatron backend" in problems(f"--train-backend fsdp {flag}")[flag.split()[0]]

    @pytest.mark.parametrize(
        "flag",
        [
            "--attn-implementation sdpa",
            "--gradient-checkpointing",
            "--fsdp-cpu-offload",
        ],
    )
    def test_what_only_fsdp_has(self, flag):
        config(f"--train-backend fsdp {flag}")
        assert "only the FSDP backend" in problems(flag)[flag.split()[0]]


def test_a_router_that_runs_already_has_a_port():
    assert "--sglang-router-port" in problems("--sglang-router-ip 10.0.0.1")["--sglang-router-ip"]
    config("--sglang-router-ip 10.0.0.1 --sglang-router-port 30000")


@pytest.mark.parametrize(("facts", "refused"), [(FACTS, True), (GPUS, False)])
def test_deterministic_engines_need_a_gpu(facts, refused):
    """SGLang's own flag, known as it is read from the installed one."""
    flag = "--sglang-enable-deterministic-inference"
    known = table().extended(grouped("engines", "sglang", switch(flag, "deterministic")))
    found = resolve(parse([*RECIPE.split(), flag], known), known, facts).problems
    assert [problem.flag for problem in found if "GPUs" in problem.what] == [flag] * refused


def test_strictly_on_policy_is_deterministic():
    assert config("--true-on-policy-mode")["deterministic_mode"] is True
    assert "sglang_enable_deterministic_inference" not in config("--true-on-policy-mode")
    assert config("--true-on-policy-mode", facts=GPUS)["sglang_enable_deterministic_inference"] is True


def test_dumping_details_names_its_files():
    found = config("--dump-details d --save-debug-train-data mine/{rollout_id}_{rank}.pt")
    assert found["save_debug_rollout_data"] == "/home/me/d/rollout_data/{rollout_id}.pt"
    assert found["save_debug_train_data"] == "/home/me/mine/{rollout_id}_{rank}.pt"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--rollout-temperature -1", "--rollout-temperature"),
        ("--rollout-top-p 0", "--rollout-top-p"),
        ("--rollout-top-p 1.5", "--rollout-top-p"),
        ("--rollout-top-k 0", "--rollout-top-k"),
        ("--lr -1", "--lr"),
        ("--lr inf", "--lr"),
        ("--adam-beta1 1", "--adam-beta1"),
        ("--eps-clip-c 1.0", "--eps-clip-c"),
        ("--rollout-batch-size 0", "--rollout-batch-size"),
        ("--actor-num-gpus-per-node 0", "--actor-num-gpus-per-node"),
        ("--seed -1", "--seed"),
        ("--num-rollout -1", "--num-rollout"),
        ("--sglang-router-port 70000", "--sglang-router-port"),
    ],
)
def test_numbers_out_of_range_are_told_with_the_range(flags, name):
    assert "allowed:" in problems(flags)[name]


@pytest.mark.parametrize(
    "flags", ["--rollout-top-p 1.0", "--rollout-temperature 0", "--lr 0", "--eps-clip-c 3", "--rollout-top-k -1"]
)
def test_numbers_at_the_edge_are_fine(flags):
    config(flags)


def test_a_router_port_without_its_address_is_said_to_have_no_effect():
    said = "--sglang-router-port 3000 has no effect"
    assert any(said in notice for notice in outcome("--sglang-router-port 3000").notices)
    outside = outcome("--sglang-router-port 3000 --sglang-router-ip 10.0.0.1")
    assert not any("router" in notice for notice in outside.notices)
