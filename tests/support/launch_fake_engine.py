"""A scripted engine as a process of its own: ``python -m support.launch_fake_engine HOST PORTS ARGUMENTS``.

In place of ``miles.backends.sglang_utils.launch_engine``, with the same arguments: see ``engine_launcher``.
"""

import asyncio
import json
import sys

from miles.backends.sglang_utils.launch_key import take_key


async def serve(port, arguments, key):
    from support.fake_engine import FakeEngine

    engine = FakeEngine(model=arguments["model_path"], api_key=key, token_s=0.02)
    await engine.start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    secret = str(take_key({}))
    asyncio.run(serve(json.loads(sys.argv[2])["http"], json.loads(sys.argv[3]), secret))
