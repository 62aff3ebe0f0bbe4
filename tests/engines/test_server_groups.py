"""``--sglang-config``: the file, what is wrong with it, and engines that are not alike."""

import base64
from dataclasses import replace

import pytest
import yaml
from support.flag_cases import FACTS, GPUS, outcome

from miles.backends.sglang_utils.server_arguments import (
    engine_size,
    rank_offset,
    server_arguments,
    slots_of_engines,
)
from miles.flags.engine_facts import EngineFacts, look_at_engines
from miles.flags.flag import Flag
from miles.training.parts import placement_requests

ARGUMENTS = {
    "max_running_requests": Flag(("--sglang-max-running-requests",), "sglang_max_running_requests", "int"),
    "mem_fraction_static": Flag(("--sglang-mem-fraction-static",), "sglang_mem_fraction_static", "float"),
    "schedule_policy": Flag(("--sglang-schedule-policy",), "sglang_schedule_policy", "str", choices=("lpm", "fcfs")),
    "cuda_graph_bs": Flag(("--sglang-cuda-graph-bs",), "sglang_cuda_graph_bs", "int", nargs="+"),
    "disable_radix_cache": Flag(("--sglang-disable-radix-cache",), "sglang_disable_radix_cache", "switch"),
    "port": Flag(("--sglang-port",), "sglang_port", "int", only=(), reason="ports are leased by the agent"),
    "pp_size": Flag(("--sglang-pp-size",), "sglang_pp_size", "int"),
}
TWO = {
    "server_groups": [
        {"num_gpus": 2, "num_gpus_per_engine": 2, "overrides": {"max_running_requests": 3}},
        {"worker_type": "regular", "num_gpus": 2, "overrides": {"schedule_policy": "lpm", "cuda_graph_bs": [1, 2]}},
    ]
}
RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    "--rm-type math --actor-num-gpus-per-node 4 --sglang-config groups.yaml"
)


def resolved(topology, flags="", facts=FACTS):
    return outcome(flags, recipe=RECIPE, facts=replace(facts, engines=EngineFacts(topology, "", ARGUMENTS)))


def told(topology, flags="", facts=FACTS):
    """All problems with the file."""
    return "\n".join(p.what for p in resolved(topology, flags, facts).problems if p.flag == "--sglang-config")


@pytest.mark.parametrize("wrapped", [TWO, {"models": [TWO]}, {"sglang": [{"name": "actor", **TWO}]}, {"models": TWO}])
def test_groups_become_engines(wrapped):
    found = resolved(wrapped)
    assert not found.problems
    config = found.config
    assert config["engine_groups"] == [
        {"num_engines": 1, "num_gpus_per_engine": 2, "overrides": {"max_running_requests": 3}},
        {"num_engines": 2, "num_gpus_per_engine": 1, "overrides": {"schedule_policy": "lpm", "cuda_graph_bs": [1, 2]}},
    ]
    assert (config["rollout_num_gpus"], config["rollout_num_engines"]) == (4, 3)
    assert [engine_size(config, rank) for rank in range(3)] == [2, 1, 1]
    assert [rank_offset(config, rank) for rank in range(3)] == [1, 3, 4]
    arguments = [server_arguments(config, rank) for rank in range(3)]
    assert [found["tp_size"] for found in arguments] == [2, 1, 1]
    assert [found.get("max_running_requests") for found in arguments] == [3, None, None]
    assert [found.get("schedule_policy") for found in arguments] == [None, "lpm", "lpm"]


def test_an_override_comes_before_the_flag():
    config = {**resolved(TWO).config, "sglang_max_running_requests": 9}
    assert [server_arguments(config, rank)["max_running_requests"] for rank in range(3)] == [3, 9, 9]


def test_engines_get_devices_in_the_order_of_the_file():
    config = resolved(TWO, facts=GPUS).config
    request = placement_requests(config)[1]
    assert (request.num_ranks, request.devices_per_rank) == (4, 1)
    assert slots_of_engines(config, [["a"], ["b"], ["c"], ["d"]]) == [["a", "b"], ["c"], ["d"]]
    assert slots_of_engines({"rollout_num_engines": 2}, [["a", "b"], ["c", "d"]]) == [["a", "b"], ["c", "d"]]


def test_colocated_groups_fill_the_trainers_gpus():
    assert told(TWO, "--colocate") == ""
    assert "groups have 4 GPUs in all, the trainer, which shares them, has 2" in told(
        TWO, "--colocate --actor-num-gpus-per-node 2"
    )


@pytest.mark.parametrize(
    ("topology", "why"),
    [
        (None, "does not hold server_groups"),
        ([], "does not hold server_groups"),
        ({"groups": []}, "groups: there is no such key"),
        ({"server_groups": []}, "server_groups: there is no group"),
        ({"server_groups": [3]}, "server_groups.0: is no group"),
        ({"server_groups": [{}]}, "server_groups.0.num_gpus: is missing"),
        ({"server_groups": [{"num_gpus": True}]}, "server_groups.0.num_gpus: is no number of GPUs"),
        ({"server_groups": [{"num_gpus": 3, "num_gpus_per_engine": 2}]}, "3 GPUs cannot be divided into engines of 2"),
        ({"server_groups": [{"num_gpus": 1, "gpus": 1}]}, "server_groups.0.gpus: there is no such key"),
        ({"server_groups": [{"num_gpus": 1, "worker_type": "prefill"}]}, "not built yet: prefill and decode apart"),
        ({"server_groups": [{"num_gpus": 1, "worker_type": "decode"}]}, "not built yet: prefill and decode apart"),
        ({"server_groups": [{"num_gpus": 1, "worker_type": "placeholder"}]}, "not built yet: GPUs that are kept free"),
        ({"server_groups": [{"num_gpus": 1, "worker_type": "other"}]}, "there is no such type"),
        ({"models": [TWO, {"name": "ref", **TWO}]}, "models: not built yet: several models (0, ref)"),
        ({"models": [{"model_path": "/other", **TWO}]}, "models.0.model_path: not built yet: a model other than"),
        ({"models": [{"update_weights": False, **TWO}]}, "models.0.update_weights: not built yet"),
        ({"models": []}, "models: is no list of models"),
        ({"server_groups": [{"num_gpus": 1, "overrides": [1]}]}, "overrides: is no mapping"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"max_runing": 1}}]}, "overrides.max_runing: the installed"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"port": 1}}]}, "refused: ports are leased by the agent"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"tp_size": 1}}]}, "it is num_gpus_per_engine of the group"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"pp_size": 2}}]}, "tensor parallel only"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"schedule_policy": "x"}}]}, "lpm or fcfs"),
        ({"server_groups": [{"num_gpus": 1, "overrides": {"max_running_requests": "x"}}]}, "is not a whole number"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(topology, why):
    assert why in told(topology)


def test_all_problems_are_told_at_once():
    bad = {
        "server_groups": [
            {"num_gpus": 0, "worker_type": "prefill", "overrides": {"port": 1, "nonsense": 2}},
            {"num_gpus": 3, "num_gpus_per_engine": 2},
        ]
    }
    assert len(told(bad).splitlines()) == 5


def test_gpus_add_up_with_the_flag():
    assert "its groups have 4 GPUs in all, and there is --rollout-num-gpus 3" in told(TWO, "--rollout-num-gpus 3")
    assert told(TWO, "--rollout-num-gpus 4") == ""
    found = resolved(TWO, "--actor-num-gpus-per-node 6", GPUS)
    assert any("need 10 GPUs" in p.what for p in found.problems)


def test_it_excludes_external_engines():
    flags = "--rollout-external --rollout-external-engine-addrs h:1"
    assert "cannot be combined with --rollout-external" in told(TWO, flags)


def test_the_file_is_read_once_and_what_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "groups.yaml"
    path.write_text(yaml.safe_dump(TWO))
    assert look_at_engines({"sglang_config": str(path)}).topology == TWO
    inline = "base64:" + base64.b64encode(path.read_bytes()).decode()
    assert look_at_engines({"sglang_config": inline}).topology == TWO
    for wrong in ("base64:%", str(tmp_path / "none.yaml")):
        assert "cannot be read" in look_at_engines({"sglang_config": wrong}).topology_error
    path.write_text("a: [")
    assert "is not YAML" in look_at_engines({"sglang_config": str(path)}).topology_error
    found = outcome(
        recipe=RECIPE, facts=replace(FACTS, engines=EngineFacts(topology_error="cannot be read: no such file"))
    )
    assert "cannot be read" in "".join(p.what for p in found.problems if p.flag == "--sglang-config")
    assert look_at_engines({}) == EngineFacts()


def test_the_installed_sglang_says_what_can_be_overridden():
    found = look_at_engines({"generate_tool_call_parser": "qwen25"})
    assert {"max_running_requests", "mem_fraction_static"} <= found.arguments.keys()
    assert {"qwen25", "llama3", "mistral"} <= set(found.tool_call_parsers)
