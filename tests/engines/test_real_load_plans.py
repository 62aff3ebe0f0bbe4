"""Plans with the model classes of the SGLang that is installed: all that they do with weights is copying."""

import base64
import json
import urllib.request
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from support.engines import real_engine
from support.load_plan_probe import UPDATES
from support.tiny_models import tiny_model

PROBE = "support.load_plan_probe.load"
TESTS = Path(__file__).parents[1]


def probed(engine, directory):
    """What the ranks of an engine report of ``LoadPlans``, by rank."""
    task = {"weights": str(engine.model), "capacity": 30000, "report": str(directory)}
    data = bytes(ForkingPickler.dumps([(json.dumps(task), torch.empty(0))]))
    post(engine, "begin_weight_update", {})
    named = [base64.b64encode(data).decode()] * engine.tp_size
    post(engine, "update_weights_from_tensor", {"serialized_named_tensors": named, "load_format": PROBE})
    post(engine, "end_weight_update", {})
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(engine.tp_size)]


def post(engine, path, body):
    headers = {"Authorization": f"Bearer {engine.api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{engine.url}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=240) as answer:
        assert answer.status == 200


@pytest.mark.long
@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "tp_size", "options"),
    [
        ("qwen3", 1, {}),
        ("qwen3", 2, {"vocab": 321, "tied": False}),
        ("qwen2", 1, {}),
        ("llama", 2, {"tied": False}),
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 2, {}),
    ],
)
def test_all_buckets_of_a_real_model_are_replayed(architecture, tp_size, options, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
    config = {"rollout_num_gpus_per_engine": tp_size, "sglang_custom_weight_loader": [PROBE]}
    with real_engine(tiny_model(architecture, **options), **config) as engine:
        reports = probed(engine, tmp_path)
    for report in reports:
        buckets = report["buckets"]
        assert report["differing"] == [] and report["refusal"] == "" and buckets > 1
        assert (report["experts_placed"] > 0) == (architecture == "qwen3_moe"), "SGLang was asked"
        recorded, checked, replayed, plain = report["counts"]
        assert (recorded, checked, plain) == (buckets, buckets, 0)
        assert replayed + report["placed"] == buckets * (UPDATES - 2) and report["placed"] > replayed
        assert report["in_place"] > (UPDATES - 2) * report["loaded"] * 0.6
