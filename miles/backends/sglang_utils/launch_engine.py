"""Starts an SGLang server: ``python -m miles.backends.sglang_utils.launch_engine HOST PORTS ARGUMENTS``.

Consumes: the host; ports as JSON by name (``http``, ``nccl``); SGLang's arguments as a JSON object by field; the API
key as ``launch_key`` says. Produces: SGLang's own HTTP server, which this process becomes the main process of. Its
scheduler and detokenizer are its children and end with it. Their sockets lie in a private directory that goes with this
process: at its end, or, if it is killed, with the next look for directories that nobody holds.

SGLang's children import this module, too (``multiprocessing`` spawns them): what stands at the top happens in each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

logger = logging.getLogger("miles.launch_engine")

KEY_FIELD = "api_key"


def prepare_process() -> None:
    """In each of SGLang's processes, before its imports."""
    from tqdm.std import TqdmDefaultWriteLock  # type: ignore[import-untyped]

    TqdmDefaultWriteLock.mp_lock = None  # no semaphore for progress bars, which a kill would leave in the system
    # As if not installed: accelerate would import it, which takes seconds and has the memory saver work in another mode
    # (megatron.core.inference sets it), in which an engine with CUDA graphs does not start.
    sys.modules.setdefault("megatron", None)  # type: ignore[arg-type]
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" and json.loads(sys.argv[3]).get("enable_return_routed_experts"):
        keep_routed_experts_unpinned()


def keep_routed_experts_unpinned() -> None:
    """SGLang keeps the experts that tokens were given to in memory that it pins for CUDA, also where there is none. Its
    table of allocators by device has no entry for a CPU: this is one that pins nothing."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: tuple[int, ...], *, dtype: Any, device: str, **_: Any) -> Any:
        import torch

        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


if __name__ == "__mp_main__":
    prepare_process()


def main() -> None:
    """Take the key, build the arguments, serve until ended."""
    from miles.backends.sglang_utils.environment import stand_ins_first
    from miles.backends.sglang_utils.launch_key import take_key
    from miles_agents.runtime_dir import runtime_dir

    key = take_key(stand_ins_first(os.environ))
    with runtime_dir(f"engine-{os.getpid()}") as directory:
        os.environ["TMPDIR"] = str(directory)  # SGLang never removes its sockets
        run(key)


def run(key: str) -> None:
    """Everything that takes time."""
    host, ports, wanted = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    prepare_process()
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    # Without a warm-up SGLang asks itself for this before it listens; ``settle`` asks again.
    logging.getLogger("sglang.srt.entrypoints.http_server").addFilter(lambda r: "freeze_gc failed" not in str(r.msg))

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from miles.backends.sglang_utils.settle import settle_when_ready

    load_plugins()
    arguments = {**wanted, "host": host, "port": ports["http"], "nccl_port": ports["nccl"], KEY_FIELD: key or None}
    settle_when_ready(f"http://{f'[{host}]' if ':' in host else host}:{ports['http']}", key)
    serve(ServerArgs(**supported(arguments, ServerArgs)))


def supported(arguments: dict[str, Any], server_args: Any) -> dict[str, Any]:
    """Those that this version of SGLang knows, unless they say what it does anyway; unknown ones are warned of."""
    import dataclasses

    import msgspec

    of_class = dataclasses.fields if dataclasses.is_dataclass(server_args) else msgspec.structs.fields
    defaults = {field.name: field.default for field in of_class(server_args)}
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        logger.warning("this version of SGLang has no argument %s: left out", ", ".join(unknown))
    return {name: value for name, value in arguments.items() if name in defaults and value != defaults[name]}


def serve(server_args: Any) -> None:
    """Serve HTTP until ended; no process of the server's is left when this returns."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree

    try:
        if hasattr(server_args, "resolve_once"):
            server_args.resolve_once()
        launch_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
