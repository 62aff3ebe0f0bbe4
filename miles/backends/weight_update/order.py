"""What SGLang is asked for: the request that has an engine's ranks connect to the trainer. Needs torch."""

from __future__ import annotations

import base64
import functools
import json
from multiprocessing.reduction import ForkingPickler

import torch

from miles.backends.weight_update.messages import UpdateMethod
from miles.backends.weight_update.stream import Place

_FILL = b"?"
"""Of a name that is yet to come. It is found by its length, as nothing else in a pickle repeats a byte so often."""


def order_payload(place: Place, engine: str, rank: int, timeout_s: float, method: UpdateMethod) -> str:
    """For one rank of an engine, in the form in which SGLang takes tensors: one that is empty, with the order as name.

    torch passes an empty tensor on by value; any other would bring a descriptor, and a helper process, along.
    """
    order = {"place": [place.host, place.port, place.token], "engine": engine, "rank": rank, "timeout_s": timeout_s}
    order["method"] = method
    name = json.dumps(order).encode("ascii")
    return base64.b64encode(_pickled(len(name)).replace(_FILL * len(name), name)).decode()


@functools.lru_cache(maxsize=64)
def _pickled(length: int) -> bytes:
    """With so many ``_FILL`` in the order's place: having torch pickle a tensor takes a while, and is waited for."""
    return bytes(ForkingPickler.dumps([(_FILL.decode() * length, torch.empty(0))]))
