"""The memory of a model's parameters and buffers: where it lies, what it holds. Needs torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from miles.backends.sglang_utils.copy_plan import WIDTHS

_CHUNK = 1 << 20
"""Elements that are summed at once: what that takes in between is 8 MiB."""
_HELD = operator.attrgetter("_parameters", "_buffers", "_modules")
_VALUES = operator.methodcaller("values")
_SPREAD = 0x1E3779B97F4A7C15
"""Makes factors of neighbours differ in all bits."""


def tensors_of(model: Any) -> list[torch.Tensor]:
    """Parameters and buffers, those that two modules share twice. Of what is no module: none."""
    return [member for member in _all_members(_all_modules(model)) if isinstance(member, torch.Tensor)]


def _all_modules(model: Any) -> list[torch.nn.Module]:
    """It, and all below it, each once."""
    return list(model.modules()) if isinstance(model, torch.nn.Module) else []


def _all_members(modules: Sequence[torch.nn.Module]) -> list[object]:
    """Parameters, buffers and children of each, also those that are None. TorchScript's modules have no dicts."""
    return list(chain.from_iterable(map(_VALUES, chain.from_iterable(map(_HELD, modules)))))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in a storage of its own kind, where they can be copied to."""
    wraps = is_lazy(tensor) or bool(is_traceable_wrapper_subclass(cast("object", tensor)))
    return not wraps and tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized


class Places:
    """Where the parameters and buffers of a model lie, to see whether that has changed.

    Attributes:
        are_plain: There are some, and all are plain. Else nothing is known of them.
    """

    def __init__(self) -> None:
        self.are_plain = False
        self._modules: list[torch.nn.Module] = []
        self._members: list[object] = []
        self._tensors: list[torch.Tensor] = []
        self._facts: list[Any] = []

    def changed(self, model: Any) -> bool:
        """Look again: whether anything is new, or elsewhere than the last time. In every update, so it has to be quick:
        while all modules have the members that they had, there is no other module."""
        members = _all_members(self._modules)
        same = self._modules[:1] == [model] and len(members) == len(self._members)
        same = same and all(map(operator.is_, members, self._members))
        if same and self.are_plain and _facts(self._tensors) == self._facts:
            return False
        self._modules = _all_modules(model)
        self._members = _all_members(self._modules)
        self._tensors = tensors = tensors_of(model)
        self.are_plain = bool(tensors) and all(map(is_plain, tensors))
        self._facts = _facts(tensors) if self.are_plain else []
        return True


def _facts(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def storages_of(model: Any) -> dict[int, torch.UntypedStorage]:
    """Those that hold something, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors_of(model))
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


class ModelMemory:
    """All bytes of a model's parameters and buffers, each once."""

    def __init__(self, model: Any) -> None:
        self._spans = [_integers(*span) for span in _spans(model)]
        self._factors: dict[torch.device, torch.Tensor] = {}

    def flip(self) -> None:
        """Invert each bit; the second time brings all back."""
        for span in self._spans:
            span.bitwise_not_()

    def digest(self) -> torch.Tensor:
        """Sums of all bits, int64 ``[n]`` on the CPU. Waits for the device.

        Each element counts with an odd factor of its own, modulo 2**64: one that differs always changes a sum, and
        that several cancel out is as likely as for random numbers, also where they have only changed places.
        """
        sums = [
            (chunk.to(torch.int64) * self._factor(chunk)).sum()
            for span in self._spans
            for chunk in torch.split(span, _CHUNK)
        ]
        devices = {total.device for total in sums}
        return torch.cat([torch.stack([s for s in sums if s.device == device]).cpu() for device in devices])

    def _factor(self, chunk: torch.Tensor) -> torch.Tensor:
        factors = self._factors.get(chunk.device)
        if factors is None:
            counted = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=chunk.device)
            factors = self._factors[chunk.device] = counted * _SPREAD | 1
        return factors[: chunk.numel()]


def _spans(model: Any) -> list[tuple[torch.UntypedStorage, int, int]]:
    """Bytes from where to where of which storage; those that overlap are one."""
    storages = storages_of(model)
    parts = []
    for tensor in tensors_of(model):
        address = tensor.untyped_storage().data_ptr()
        if address in storages and tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset())
            parts.append((address, start * tensor.itemsize, (start + int(last) + 1) * tensor.itemsize))
    spans: list[tuple[int, int, int]] = []
    for address, start, stop in sorted(parts):
        if spans and spans[-1][0] == address and start < spans[-1][2]:
            spans[-1] = (address, spans[-1][1], max(stop, spans[-1][2]))
        else:
            spans.append((address, start, stop))
    return [(storages[address], start, stop) for address, start, stop in spans]


def in_storage(
    storage: torch.UntypedStorage, dtype: torch.dtype, start: int, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """A tensor of elements of a storage; ``start`` in elements of its dtype."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, start, shape, strides)


def _integers(storage: torch.UntypedStorage, start: int, stop: int) -> torch.Tensor:
    """These bytes as the widest integers that fit, ``[n]``."""
    width = next(w for w in WIDTHS if not (start % w or stop % w))
    return in_storage(storage, WIDTHS[width], start // width, ((stop - start) // width,), (1,))
