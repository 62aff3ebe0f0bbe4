"""Records what a model's loader copies from a bucket. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles.backends.sglang_utils.copy_plan import Copy, Fill, Region, Step

_COPY = torch.ops.aten.copy_.default
_FILL = torch.ops.aten.fill_.Scalar
_ZERO = torch.ops.aten.zero_.default


class CopyRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation of this thread while it is entered, and does it.

    Taken are: copies from the bucket into the model, numbers written into the model, views (whatever gives nothing but
    tensors in memory that it was given), and all that has neither the bucket nor the model as an argument. Anything
    else makes it impossible to say what the model holds afterwards: ``refusal`` then says what it was.

    Args:
        memory: The bucket, uint8 ``[n]``.
        addresses: Of the model's storages.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch, with which a mode keeps clear of its compiler: that would import it first, which takes seconds."""
        return False

    def __init__(self, memory: torch.Tensor, addresses: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.refusal = ""
        self._bucket = memory.untyped_storage().data_ptr()
        self._offset = int(memory.storage_offset())
        self._model = frozenset(addresses)
        if self._bucket in self._model:
            self.refusal = "the bucket lies in the model's memory"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = _addresses(args, kwargs)
        result = func(*args, **kwargs)
        if not self.refusal and not given.isdisjoint(self._model | {self._bucket}):
            self._note(func, args, given, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], given: set[int], result: Any) -> None:
        if func in {_COPY, _FILL, _ZERO} and not args[0].numel():
            return  # writes nothing
        if func is _COPY:
            self._note_copy(args[0], args[1])
        elif func is _ZERO:
            self._note_fill(args[0], 0)
        elif func is _FILL:
            self._note_fill(args[0], args[1])
        elif not _is_view(func, given, result):
            self.refusal = f"{func} on the bucket or the model"

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target_address, source_address = _address(target), _address(source)
        if target_address not in self._model or source_address != self._bucket:
            self.refusal = "a copy that is not from the bucket into the model"
        elif source.is_neg() or target.is_neg() or source.is_conj() or target.is_conj():
            self.refusal = "a copy of a view that negates"
        else:
            region = _region(0, source.expand(target.shape), self._offset)
            self.steps.append(Copy(_region(target_address, target), region))

    def _note_fill(self, target: torch.Tensor, value: Any) -> None:
        if _address(target) not in self._model or not isinstance(value, bool | int | float):
            self.refusal = f"{value} written elsewhere than into the model"
        else:
            self.steps.append(Fill(_region(_address(target), target), value))


def _is_view(func: Any, given: set[int], result: Any) -> bool:
    leaves = tree_leaves(result)
    tensors_only = bool(leaves) and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    return tensors_only and not func._schema.is_mutable and _addresses(leaves) <= given


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _addresses(*values: Any) -> set[int]:
    return {_address(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def _region(memory: int, tensor: torch.Tensor, offset: int = 0) -> Region:
    start = int(tensor.storage_offset()) * tensor.itemsize - offset
    return Region(memory, tensor.dtype, start, tuple(tensor.shape), tensor.stride())
