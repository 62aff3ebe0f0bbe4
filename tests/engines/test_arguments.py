"""From the run's configuration to the arguments and the environment of engines and router."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from support.engines import engine_config, engine_model

from miles.backends.sglang_utils.environment import STAND_INS, engine_environment, stand_ins_first
from miles.backends.sglang_utils.launch_engine import supported
from miles.backends.sglang_utils.launch_key import KEY_VARIABLE, Secret
from miles.backends.sglang_utils.server_arguments import (
    CPU_CACHE_BYTES,
    RECEIVE_WEIGHTS,
    BadEngineConfig,
    cache_tokens,
    router_arguments,
    server_arguments,
)


def arguments(rank=0, **config):
    return server_arguments(engine_config(engine_model(), **config), rank)


def test_an_engine_on_a_cpu_gets_what_works_there():
    found = arguments(1, offload_rollout=True)
    assert found["model_path"] == str(engine_model()) and found["random_seed"] == 2
    assert found["attention_backend"] == "torch_native" and found["sampling_backend"] == "pytorch"
    assert found["grammar_backend"] == "none" and found["sleep_on_idle"] is True
    assert found["enable_memory_saver"] is False, "the scheduler dies of it on a CPU"
    assert found["dtype"] == "float32" and found["device"] == "cpu"
    assert found["custom_weight_loader"] == [RECEIVE_WEIGHTS]
    assert json.loads(json.dumps(found)) == found


def test_what_was_typed_wins_except_what_the_run_decides():
    found = arguments(
        sglang_attention_backend="intel_amx",
        sglang_dtype="bfloat16",
        sglang_max_total_tokens=99,
        sglang_mem_fraction_static=0.4,
        sglang_custom_weight_loader=["mine.load"],
        sglang_tp_size=8,
        sglang_random_seed=77,
        sglang_enable_metrics=False,
        sglang_context_length=None,
        rollout_num_gpus_per_engine=2,
    )
    assert found["attention_backend"] == "intel_amx" and found["dtype"] == "bfloat16"
    assert found["max_total_tokens"] == 99 and found["mem_fraction_static"] == 0.4
    assert found["custom_weight_loader"] == ["mine.load", RECEIVE_WEIGHTS]
    assert found["tp_size"] == 2 and found["random_seed"] == 1 and found["enable_metrics"] is True
    assert "context_length" not in found


def test_flags_that_are_no_server_arguments_stay_here():
    found = arguments(
        sglang_server_concurrency=64, sglang_router_ip="x", sglang_router_policy="random", sglang_api_key="secret"
    )
    assert not {"server_concurrency", "router_ip", "router_policy", "api_key"} & found.keys()
    assert "secret" not in json.dumps(found)


def test_an_engine_on_gpus_gets_the_memory_saver_and_nothing_that_is_for_cpus():
    found = arguments(device="cuda", offload_rollout=True, params_dtype="bfloat16")
    assert found["enable_memory_saver"] is True and found["dtype"] == "bfloat16"
    assert not {"attention_backend", "max_total_tokens", "sleep_on_idle"} & found.keys()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("sglang_pp_size", 2, "--sglang-pp-size 2"),
        ("sglang_dp_size", 2, "--sglang-dp-size 2"),
        ("sglang_admin_api_key", "k", "--sglang-admin-api-key"),
    ],
)
def test_what_is_not_served_is_refused_by_its_flag(flag, value, words):
    with pytest.raises(BadEngineConfig, match=words) as caught:
        arguments(**{flag: value})
    assert caught.value.advice and caught.value.evidence
    assert "--sglang-api-key" not in caught.value.advice  # it is refused, too


def test_the_cache_on_a_cpu_holds_what_can_run_at_once_within_a_gigabyte():
    config = engine_config(engine_model())
    assert cache_tokens(config) == 16384
    config |= {"rollout_batch_size": 64, "n_samples_per_prompt": 8, "sglang_server_concurrency": 128}
    assert cache_tokens(config) == 128 * 512
    large = config["hf_config"] | {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128}
    bytes_per_token = 2 * 32 * 2 * 128 * 4
    config |= {"hf_config": large | {"max_position_embeddings": 1024}}
    assert cache_tokens(config) == CPU_CACHE_BYTES // bytes_per_token
    config |= {"hf_config": large | {"max_position_embeddings": 40960}}
    assert cache_tokens(config) == 2 * 40960, "less than two prompts would make no sense"


def test_the_router_gets_its_flags_and_those_with_its_other_name_win():
    config = {"router_policy": "random", "router_retry_max_retries": 7, "router_api_key": "k", "router_log_dir": None}
    config |= {"sglang_router_policy": "round_robin", "sglang_router_request_timeout_secs": 14400, "rollout": 1}
    assert router_arguments(config) == {
        "router_policy": "round_robin",
        "router_retry_max_retries": 7,
        "router_request_timeout_secs": 14400,
        "router_log_level": "warn",
        "router_disable_circuit_breaker": True,
    }


def test_the_environment_gives_way_to_the_users_except_for_threads_and_devices():
    env = engine_environment("cpu", index=3, tp_size=2, colocate=True, inherited={}, num_cores=4)
    assert env["SGLANG_USE_CPU_ENGINE"] == "1" and env["HF_HUB_OFFLINE"] == "1" and env["OMP_NUM_THREADS"] == "1"
    assert env["SGLANG_CPU_OMP_THREADS_BIND"] == "2|3"
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    own = {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "8", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    env = engine_environment("cpu", index=0, tp_size=2, colocate=True, inherited=own)
    assert "HF_HUB_OFFLINE" not in env and "SGLANG_CPU_OMP_THREADS_BIND" not in env and env["OMP_NUM_THREADS"] == "1"


def test_an_engine_on_gpus_sees_its_own_only():
    env = engine_environment(
        "cuda", index=1, tp_size=2, colocate=True, inherited={"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, device_ids=["2", "3"]
    )
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # what the indices count by
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3" and env["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] == "0"
    assert env["SGLANG_DG_CACHE_DIR"].endswith("rank_1")
    assert "SGLANG_USE_CPU_ENGINE" not in env and "OMP_NUM_THREADS" not in env
    alone = engine_environment("cuda", index=0, tp_size=1, colocate=True, inherited={})
    assert alone["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] == "1" and "CUDA_VISIBLE_DEVICES" not in alone


def test_stand_ins_are_first_on_the_path_of_an_engine_on_a_cpu_and_of_nothing_else():
    assert stand_ins_first({"PYTHONPATH": "/a"}) == {}
    env = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"/a:{STAND_INS}:/b"}
    assert stand_ins_first(env) == {"PYTHONPATH": f"{STAND_INS}:/a:/b"}
    assert (STAND_INS / "triton").is_dir() and (STAND_INS / "sgl_kernel").is_dir()
    assert str(STAND_INS) not in sys.path


def test_a_secret_does_not_show_but_is_the_text():
    secret = Secret("key")
    assert repr({"api_key": secret}) == "{'api_key': '***'}" and secret == "key" and f"Bearer {secret}" == "Bearer key"


PROGRAM = """
import json, os, sys
from pathlib import Path
from miles.backends.sglang_utils.launch_engine import supported
from miles.backends.sglang_utils.launch_key import take_key
before = os.getpid()
key = take_key({"ADDED": "yes"})
shown = [Path(f"/proc/self/{name}").read_text() for name in ("environ", "cmdline")]
shows = any("hush" in text for text in shown)
print(json.dumps([key, repr(key), shows, os.environ["ADDED"], "hush" in str(os.environ)]))
"""


def test_a_launcher_takes_its_key_out_of_its_environment(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {**os.environ, KEY_VARIABLE: "hush"}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["hush", "'***'", False, "yes", False]


def test_a_launcher_without_a_key_has_none(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0] == ""


def test_connections_of_the_router_outlast_training_and_a_few_errors_shut_nobody_out():
    env = engine_environment("cpu", index=0, tp_size=1, colocate=True, inherited={})
    assert int(env["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 3600
    assert router_arguments({})["router_disable_circuit_breaker"] is True
    # Who types one flag of the router's gets the defaults of all others along.
    along = {"router_cb_failure_threshold": 10, "router_disable_circuit_breaker": False}
    assert router_arguments(along)["router_disable_circuit_breaker"] is True
    assert not router_arguments({**along, "router_cb_failure_threshold": 3})["router_disable_circuit_breaker"]


@dataclass
class Known:
    """Arguments of some version of SGLang."""

    model_path: str
    dtype: str = "auto"
    paths: list[str] = field(default_factory=list)


def test_arguments_that_this_version_does_not_know_are_left_out_and_named(caplog):
    found = supported({"model_path": "m", "dtype": "auto", "paths": ["a"], "newer": 1}, Known)
    assert found == {"model_path": "m", "paths": ["a"]}
    assert "newer" in caplog.text and "dtype" not in caplog.text


def test_an_engine_beside_other_machines_is_told_no_loopback():
    env = engine_environment("cpu", index=0, tp_size=1, colocate=False, inherited={}, is_alone=False)
    assert "GLOO_SOCKET_IFNAME" not in env
    assert engine_environment("cpu", index=0, tp_size=1, colocate=False, inherited={})["GLOO_SOCKET_IFNAME"] == "lo"


def test_sglangs_processes_see_no_megatron_core():
    """accelerate would import it, which sets the memory saver to a mode in which CUDA graphs cannot be paused."""
    program = (
        "from miles.backends.sglang_utils.launch_engine import prepare_process; prepare_process(); "
        "import importlib.util; print(importlib.util.find_spec('megatron'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "None"
    with_it = "import importlib.util; print(importlib.util.find_spec('megatron') is not None)"
    shown = subprocess.run([sys.executable, "-c", with_it], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "True"  # it is installed, or the above would show nothing
