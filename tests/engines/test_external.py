"""``--rollout-external``: engines of somebody else, looked at, used, and left as they were."""

import asyncio
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import ClientSession, web
from support.cluster import error_of, real_cluster
from support.engines import KEY, changed_copy, engine_config, engine_model, external_config
from support.fake_engine import fake_engine
from support.flag_cases import GPUS, config, outcome, problems
from support.procs import eventually
from support.tool_cases import call
from support.training_runs import command, environment

from miles.backends.base import ParallelState
from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.external import KEY_VARIABLE, ExternalEngineUnfit, ExternalService, adopt
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.fleet_parts import EngineDied, death_of
from miles.backends.weight_update.sender import make_sender
from miles.flags.rules_external import plain_address
from miles.tracking.metrics_file import read_metrics
from miles.training.parts import placement_requests

APART = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
)
APART += "--rm-type math --actor-num-gpus-per-node 2 --rollout-external"
ADDRS = "--rollout-external-engine-addrs"


def test_addresses_become_engines_and_take_no_gpu():
    found = config(f"{ADDRS} http://10.0.0.1:30000/ [::1]:2", recipe=APART, facts=GPUS)
    assert found["rollout_external_engine_addrs"] == ["10.0.0.1:30000", "[::1]:2"]
    assert (found["rollout_num_gpus"], found["rollout_num_engines"]) == (0, 2)
    assert [request.name for request in placement_requests(found)] == ["trainer"]


@pytest.mark.parametrize(
    ("flags", "flag", "why"),
    [
        ("", "--rollout-external", "there is no engine to use"),
        (f"{ADDRS} here", ADDRS, "is no address"),
        (f"{ADDRS} h:1 h:1", ADDRS, "is given twice"),
        (f"{ADDRS} h:1 --colocate", "--colocate", "weights reach them by broadcast only"),
        (f"{ADDRS} h:1 --offload-rollout", "--offload-rollout", "keep their memory"),
    ],
)
def test_what_cannot_be_is_told(flags, flag, why):
    assert why in problems(flags, recipe=APART)[flag]


def test_numbers_of_gpus_have_no_effect():
    told = outcome(f"{ADDRS} h:1 --rollout-num-gpus 4", recipe=APART).notices
    assert "--rollout-num-gpus has no effect with --rollout-external: the engines run already" in told


@pytest.mark.parametrize("wrong", ["", "h", "h:", "h:x", "h:0", "ftp://h:1", "h:1/path", "https://h:1", "u@h:1"])
def test_no_address(wrong):
    assert plain_address(wrong) == ""


async def let_all_go(engines):
    for engine in engines:
        await engine.service.stop()
        await engine.client.close()


async def test_fit_engines_are_adopted_with_places_by_their_size():
    async with (
        fake_engine(model=engine_model(), api_key="key") as first,
        fake_engine(model=engine_model(), api_key="key", bracket=False) as second,
    ):
        first.told = {"server": {"tp_size": 2}, "model": {"model_type": "qwen3", "model_path": str(engine_model())}}
        first.paused, first.session_open = "retract", True
        engines = await adopt(external_config(first, second), "key")
        places = [(e.target.name, e.target.tp_size, e.target.rank_offset, e.target.has_bracket) for e in engines]
        assert places == [("external-0", 2, 1, True), ("external-1", 1, 3, False)]
        assert first.paused is None and not first.session_open, "left so by a run before"
        await let_all_go(engines)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"model": {"model_type": "llama"}}, "it serves model_type llama, --hf-checkpoint has qwen3"),
        ({"model": {"architectures": ["LlamaForCausalLM"]}}, "it serves architectures LlamaForCausalLM"),
        ({"model": {"disaggregation_mode": "prefill"}}, "it does only prefill"),
        ({"model": {"is_generation": False}}, "it does not generate"),
        ({"server": {"version": "0.5.9"}}, "it is SGLang 0.5.9; 0.5.16 is the oldest"),
        ({"server": {"dp_size": 2}}, "dp_size is 2"),
        ({"server": {"enable_return_routed_experts": False}}, "it records no experts: start it with --enable-return"),
        ({"server": {"context_length": 64}}, "its context has 64 tokens, --rollout-max-context-len is 128"),
    ],
)
async def test_an_engine_that_does_not_fit_is_told(told, why):
    async with fake_engine(model=engine_model()) as fake:
        fake.told = told
        config = external_config(fake, rollout_max_context_len=128, use_rollout_routing_replay=True)
        fake.told.setdefault("server", {}).setdefault("enable_return_routed_experts", True)
        error = await error_of(adopt(config, ""), ExternalEngineUnfit)
    assert f"{fake.url}: {why}" in error.evidence


async def test_all_that_is_wrong_is_told_at_once(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"num_hidden_layers": 7, "hidden_size": 64}))
    async with (
        fake_engine(model=engine_model(), api_key="key") as locked,
        fake_engine() as wrong,
        fake_engine() as gone,
    ):
        wrong.told = {"model": {"model_path": str(other)}}
        wrong.weights = {"model.embed_tokens.weight": torch.zeros(4, 48)}
        await gone.die()
        error = await error_of(adopt(external_config(locked, wrong, gone), ""), ExternalEngineUnfit)
    assert "3 of 3 external engines cannot be used" in error.what and KEY_VARIABLE in error.advice
    for told in ("401", "has num_hidden_layers 7", "has hidden_size 64", "hidden size 48", "did not answer"):
        assert told in error.evidence


async def test_one_that_stops_answering_is_lost_but_not_while_it_is_paused():
    async with fake_engine() as fake, EngineClient(fake.url, name="external-0") as client:
        service = ExternalService(client, probe_every_s=0.01, probe_s=1.0)
        await service.pause()
        await fake.die()
        for _ in range(3):
            await eventually(lambda: service.phase == "paused")
        await service.resume()
        error = await death_of(service)
        assert isinstance(error, EngineDied) and "external-0 is lost" in error.what and "/health" in error.evidence
        await service.stop()


class Trainer:
    """Stands for the mesh: sends weights from this process."""

    def __init__(self, weights):
        self.weights, self.sender = weights, None

    async def __call__(self, update):
        assert update.method == "broadcast"
        self.sender = self.sender or make_sender(ParallelState(), update, torch.device("cpu"))
        await asyncio.to_thread(self.sender.send, update, iter(self.weights.items()))


@pytest.mark.full
async def test_a_fleet_of_them_is_updated_fenced_and_left_running(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "theirs")
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(model=engine_model(), api_key="theirs")) for _ in range(2)]
        cluster = await stack.enter_async_context(real_cluster(tmp_path / "run"))
        fleet = EngineFleet(cluster.controller, external_config(*fakes, sglang_router_policy="round_robin"))
        await fleet.start()
        assert [s["name"] for s in cluster.controller.services.snapshot()] == ["router"]
        trainer = Trainer({"a": torch.ones(9)})
        assert await fleet.weight_update(trainer) == 1
        assert all(torch.equal(fake.weights["a"], torch.ones(9)) and fake.version == "1" for fake in fakes)
        async with EngineClient(fleet.router_url, fleet.api_key, name="router") as client:
            for index in range(4):
                await client.generate([1, index], {"max_new_tokens": 2})
            assert all(fake.count("/generate") == 2 for fake in fakes)
            fakes[1].faults["/begin_weight_update"] = [500]
            assert await fleet.weight_update(trainer) == 2
            assert [target.name for target in fleet.targets] == ["external-0"]
            for index in range(2):
                await client.generate([1, index], {"max_new_tokens": 2})
            assert fakes[1].count("/generate") == 2
        cluster.identities()
        trainer.sender.close()
        await fleet.stop()
        assert not cluster.controller.services.snapshot()
        assert fakes[0].paused is None and fakes[0].groups == {} and not fakes[0].dead
        assert not fakes[1].dead, "fenced, and still somebody else's"


@pytest.mark.full
async def test_the_real_engine_fits_and_another_model_does_not(warm_engine, tmp_path):
    address = warm_engine.url.removeprefix("http://")
    same = engine_config(warm_engine.model, rollout_external=True, rollout_external_engine_addrs=[address])
    engines = await adopt(same, KEY)
    assert engines[0].target.has_bracket and engines[0].target.tp_size == 1
    await let_all_go(engines)
    path, _ = changed_copy(warm_engine.model, tmp_path / "other", factor=1.0)
    changed = json.loads((path / "config.json").read_text()) | {"hidden_size": 48, "model_type": "llama"}
    error = await error_of(adopt({**same, "hf_config": changed}, KEY), ExternalEngineUnfit)
    for told in ("model_type qwen3", "has hidden_size 32"):
        assert told in error.evidence
    error = await error_of(adopt(same, "wrong"), ExternalEngineUnfit)
    assert "401" in error.evidence


@asynccontextmanager
async def in_front_of(engine):
    """Somebody else's engine as another address: passes everything on, and adds a tool call to what is parsed."""

    async def pass_on(request):
        body = await request.read()
        if request.path == "/parse_function_call":
            asked = json.loads(body)
            asked["text"] += call("calculate", expression="6*7")
            body = json.dumps(asked).encode()
        headers = {key: request.headers[key] for key in ("Authorization", "Content-Type") if key in request.headers}
        async with session.request(request.method, engine.url + request.path_qs, data=body, headers=headers) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession() as session:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


EXAMPLE = Path(__file__).parents[2] / "examples" / "tools"


@pytest.mark.full
async def test_a_run_trains_in_turns_with_an_engine_that_it_has_not_started(warm_engine, tmp_path):
    """The flags of examples/tools, with its calculator."""
    script = (EXAMPLE / "train.sh").read_text()
    own = dict(re.findall(r"^    (--\S+) (\S+) \\$", script, re.MULTILINE)) | {"--generate-max-turns": 2}
    assert own["--generate-execute-tool-function-path"] == "calculator.execute"
    flags = own | {
        "--rollout-external": True, "--rollout-num-gpus": None, "--sglang-max-total-tokens": None,
        "--num-rollout": 2, "--rollout-batch-size": 2, "--n-samples-per-prompt": 2, "--rollout-max-response-len": 32,
        "--rollout-stop-token-ids": tuple(range(0, 320, 2)), "--log-multi-turn": True,
    }  # fmt: skip
    env = {**environment(), KEY_VARIABLE: KEY, "PYTHONPATH": str(EXAMPLE)}
    try:
        async with in_front_of(warm_engine) as address, EngineClient(warm_engine.url, KEY) as client:
            argv, run_dir = command(
                tmp_path, flags | {"--rollout-external-engine-addrs": address}, model=warm_engine.model
            )
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *argv, env=env, stdout=pipe, stderr=asyncio.subprocess.STDOUT
            )
            output = (await process.communicate())[0].decode()
            assert process.returncode == 0, output
            assert int((await client.model_info())["weight_version"]) >= 2
            assert not await client.destroy_weights_update_group("miles"), "it was left in the run's group"
            assert len((await client.generate([1, 2], {"max_new_tokens": 2}))["output_ids"]) == 2
        assert not list(run_dir.rglob("engine*.log"))
        rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "rollout"]
        assert [row["multi_turn/multi_turn_metric/round_number_mean"] for row in rows] == [2.0, 2.0]
        assert [row["rollout/raw_reward"] for row in rows] == pytest.approx([0.1, 0.1]), "each sample's call worked"
        assert all(
            row["multi_turn/wo_obs_response_length/response_length_mean"]
            < row["multi_turn/raw_response_length/response_length_mean"]
            for row in rows
        )
    finally:
        async with EngineClient(warm_engine.url, KEY) as client:
            await client.resume()
            await client.update_weights_from_disk(str(warm_engine.model), version="default")
