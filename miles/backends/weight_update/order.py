"""What SGLang is asked for: the request that has an engine's ranks connect to the trainer. Needs torch."""

from __future__ import annotations

import base64
import json
from multiprocessing.reduction import ForkingPickler

import torch

from miles.backends.weight_update.messages import UpdateMethod
from miles.backends.weight_update.stream import Place


def order_payload(place: Place, engine: str, rank: int, timeout_s: float, method: UpdateMethod) -> str:
    """For one rank of an engine, in the form in which SGLang takes tensors: one that is empty, with the order as name.

    torch passes an empty tensor on by value; any other would bring a descriptor, and a helper process, along.
    """
    order = {"place": [place.host, place.port, place.token], "engine": engine, "rank": rank, "timeout_s": timeout_s}
    order["method"] = method
    return base64.b64encode(bytes(ForkingPickler.dumps([(json.dumps(order), torch.empty(0))]))).decode()
