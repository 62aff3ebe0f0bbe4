"""``--check-weight-update-equal`` and ``--check-weight-update-skip-list``, against a scripted engine."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.fake_engine import fake_engine

from miles.backends.sglang_utils.client import EngineClient
from miles.backends.sglang_utils.equal_weights import WeightsDiffer
from miles.backends.sglang_utils.fleet import EngineFleet
from miles.flags.table import table

HELD = {"model.a.weight": torch.ones(3), "model.b.weight": torch.zeros(2), "rotary.cache": torch.zeros(1)}


def fleet_of(client, skip):
    config = {"check_weight_update_skip_list": skip}
    engine = SimpleNamespace(client=client)
    return SimpleNamespace(_config=config, _roster=SimpleNamespace(living=[engine]), weight_version=3)


@pytest.fixture
def export(tmp_path):
    """With another cache than the engine has."""
    save_file({**HELD, "rotary.cache": torch.ones(1)}, tmp_path / "model.safetensors")
    return tmp_path


async def test_parameters_that_are_left_out_may_differ(export, caplog):
    flag = table().by_name["--check-weight-update-skip-list"]
    async with fake_engine() as fake, EngineClient(fake.url, name="engine-0") as client:
        fake.weights = dict(HELD)
        with pytest.raises(WeightsDiffer, match="engine-0") as caught:
            await EngineFleet.check_equal(fleet_of(client, flag.default), export)
        assert "rotary.cache" in caught.value.evidence and "model.a" not in caught.value.evidence
        fake.weights = dict(HELD)
        await EngineFleet.check_equal(fleet_of(client, ["cache"]), export)
        assert fake.version == "3" and caplog.text == ""
        await EngineFleet.check_equal(fleet_of(client, ["no_such"]), export)
        assert "no parameter of engine-0 has ['no_such'] in its name" in caplog.text
        fake.weights = {**HELD, "model.b.weight": torch.ones(2)}
        with pytest.raises(WeightsDiffer) as caught:
            await EngineFleet.check_equal(fleet_of(client, ["cache"]), export)
        assert "model.b.weight" in caught.value.evidence and "rotary" not in caught.value.evidence
