"""Entering a controller's context: what fails there leaves nothing in the embedder's loop."""

import asyncio

import pytest

from miles_agents.errors import MilesError
from miles_controller import Controller, ControllerConfig


def armed_timers():
    return [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]


@pytest.mark.parametrize("config", [{"run_id": "x" * 60}, {"bind": "tcp://203.0.113.77:1", "status": False}])
def test_a_controller_that_cannot_be_entered_leaves_nothing_behind(config):
    async def story():
        with pytest.raises((MilesError, OSError)):
            await Controller(ControllerConfig(**config)).__aenter__()
        assert armed_timers() == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(story())
