"""Which expert of a model lies where in this SGLang process: what ``load_weights`` asks beside names and shapes."""

from __future__ import annotations

import sys


def expert_places() -> bytes | None:
    """The same as before: experts have not changed places. Empty: SGLang keeps none. None: it cannot be told.

    SGLang moves experts between layers' slots while it serves (``--enable-eplb``), without any tensor being replaced.
    """
    module = sys.modules.get("sglang.srt.eplb.expert_location")
    if module is None:
        return b""
    metadata = module.get_global_expert_location_metadata()
    if metadata is None:
        return b""
    places = getattr(metadata, "physical_to_logical_map_cpu", None)
    return None if places is None else bytes(places.contiguous().numpy().tobytes())
