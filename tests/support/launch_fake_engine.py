"""A scripted engine as a process of its own: ``python -m support.launch_fake_engine HOST PORTS ARGUMENTS``.

In place of ``miles.backends.sglang_utils.launch_engine``, with the same arguments: see ``engine_launcher``.

Files below ``MILES_TEST_STRIKES`` whose names begin so are signals that an engine sends itself when that request comes;
each is taken by one: ``end_weight_update.SIGKILL.1``.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from miles.backends.sglang_utils.launch_key import take_key


def strike(path):
    """Before this request is answered."""
    for file in Path(os.environ["MILES_TEST_STRIKES"]).glob(f"{path.strip('/')}.*"):
        try:
            file.unlink()
        except FileNotFoundError:  # the other one took it
            continue
        os.kill(os.getpid(), signal.Signals[file.name.split(".")[1]])
        return


async def serve(port, arguments, key):
    from support.fake_engine import FakeEngine

    engine = FakeEngine(model=arguments["model_path"], api_key=key, token_s=0.02)
    if "MILES_TEST_STRIKES" in os.environ:
        engine.on_request = strike
    await engine.start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    secret, wanted = str(take_key({})), json.loads(sys.argv[3])
    if "fake_failing_part" in wanted and wanted["fake_failing_part"] == wanted.get("node_rank"):
        sys.exit("this part of the engine does not start")
    asyncio.run(serve(json.loads(sys.argv[2])["http"], wanted, secret))
