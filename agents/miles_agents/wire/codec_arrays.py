"""Packers and builders for numpy and torch, without importing them: their values exist only where they are loaded.

Arrays and tensors arrive as views of the buffer that came, without a copy, and are writable if it is. Small ones
come inline, where the bytes are read-only, so they are copied once and are always writable. torch has no
read-only tensors and warns about read-only memory: there a tensor is a copy.
"""

from __future__ import annotations

import re
import sys
from math import prod
from types import ModuleType
from typing import Any

from miles_agents.wire.codec_tags import (
    BadContent,
    BulkOutgoing,
    Gathered,
    Incoming,
    Outgoing,
    Packer,
    Stuck,
    expect,
    read_shape,
    tag,
)
from miles_agents.wire.codec_types import OpaqueArray, OpaqueTensor, OpaqueValue

_DTYPE = re.compile(r"[<>|=][biufcSUVmM][0-9]{1,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")
_BY_VALUE = "Weights go by CUDA IPC or NCCL (a weight update); for a small tensor send tensor.detach().cpu()."


def _build_array(items: list[Any], state: Incoming) -> Any:
    (_, dtype, shape, order, reference) = items
    shape = read_shape(shape)
    data = state.take(reference)
    expect(order in ("C", "F"), "an array of unknown order")
    np = state.library("numpy")
    if np is None:
        return OpaqueArray(dtype, shape, order, data)
    found = _read_dtype(np, dtype)
    expect(prod(shape) * found.itemsize == data.nbytes, "an array of another size than its buffer")
    return np.ndarray(shape, found, _own_if_inline(data, reference), order=order)


def _build_scalar(items: list[Any], state: Incoming) -> Any:
    (_, dtype, data) = items
    expect(type(data) in (bytes, str), "a scalar without bytes")
    np = state.library("numpy")
    if np is None:
        return OpaqueValue("numpy.generic", (dtype, data))
    if dtype in ("S", "U"):
        return np.bytes_(data) if dtype == "S" else np.str_(data)
    found = _read_dtype(np, dtype)
    expect(found.itemsize == len(data), "a scalar of another size than its type")
    return np.ndarray((), found, bytearray(data))[()]


def _build_dtype(items: list[Any], state: Incoming) -> Any:
    (_, dtype) = items
    np = state.library("numpy")
    return OpaqueValue("numpy.dtype", dtype) if np is None else _read_dtype(np, dtype)


def _build_tensor(items: list[Any], state: Incoming) -> Any:
    (_, dtype, shape, reference) = items
    shape = read_shape(shape)
    data = state.take(reference)
    torch = state.library("torch")
    if torch is None:
        expect(type(dtype) is str, "a tensor without a dtype")
        return OpaqueTensor(dtype, shape, data)
    found = _torch_dtype(torch, dtype)
    expect(prod(shape) * found.itemsize == data.nbytes, "a tensor of another size than its buffer")
    if not data.nbytes:
        return torch.empty(shape, dtype=found)
    flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    if flat.data_ptr() % found.itemsize:
        flat = flat.clone()  # torch's kernels count on aligned elements
    return flat.view(found).reshape(shape)


def _build_size(items: list[Any], state: Incoming) -> Any:
    (_, shape) = items
    shape = read_shape(shape)
    torch = state.library("torch")
    return OpaqueValue("torch.Size", shape) if torch is None else torch.Size(shape)


def _build_torch_dtype(items: list[Any], state: Incoming) -> Any:
    (_, name) = items
    torch = state.library("torch")
    return OpaqueValue("torch.dtype", name) if torch is None else _torch_dtype(torch, name)


def _build_device(items: list[Any], state: Incoming) -> Any:
    (_, name) = items
    expect(type(name) is str, "a device without a name")
    torch = state.library("torch")
    return OpaqueValue("torch.device", name) if torch is None else torch.device(name)


def _own_if_inline(data: memoryview, reference: Any) -> memoryview | bytearray:
    return bytearray(data) if type(reference) is bytes else data


def _torch_dtype(torch: ModuleType, name: Any) -> Any:
    found = vars(torch).get(name) if type(name) is str else None
    expect(isinstance(found, torch.dtype), f"no torch dtype {name!r:.60}")
    return found


def _read_dtype(np: ModuleType, plain: Any) -> Any:
    """Rebuild a dtype from plain data; one that holds Python objects is refused."""
    if type(plain) is str:
        expect(_DTYPE.fullmatch(plain) is not None, f"no numpy dtype {plain!r:.60}")
        return np.dtype(plain)
    expect(type(plain) is list and len(plain) in (3, 6), "no numpy dtype")
    if len(plain) == 3:
        _, base, shape = plain
        return np.dtype((_read_dtype(np, base), read_shape(shape)))
    _, names, formats, offsets, itemsize, aligned = plain
    spec = {"names": names, "formats": [_read_dtype(np, f) for f in formats], "offsets": offsets}
    return np.dtype({**spec, "itemsize": itemsize}, align=aligned is True)


ARRAY = tag(40, _build_array)
SCALAR = tag(41, _build_scalar)
DTYPE = tag(42, _build_dtype)
TENSOR = tag(43, _build_tensor)
SIZE = tag(44, _build_size)
TORCH_DTYPE = tag(45, _build_torch_dtype)
DEVICE = tag(46, _build_device)


def _plain_dtype(np: Any, dtype: Any) -> Any:
    """A dtype as plain data that ``_read_dtype`` turns into an equal one; else Stuck."""
    if dtype.hasobject:
        raise Stuck(f"has the numpy dtype '{dtype}'", "Send a list, or an array of numbers or fixed-width text.")
    if dtype.subdtype is not None:
        plain: Any = ["sub", _plain_dtype(np, dtype.subdtype[0]), list(dtype.subdtype[1])]
    elif dtype.names is None:
        plain = dtype.str
    else:
        fields = [dtype.fields[name] for name in dtype.names]
        formats = [_plain_dtype(np, field[0]) for field in fields]
        offsets = [int(field[1]) for field in fields]
        plain = ["struct", list(dtype.names), formats, offsets, dtype.itemsize, dtype.isalignedstruct]
    try:
        same = _read_dtype(np, plain) == dtype
    except BadContent:
        same = False
    if not same:
        raise Stuck(f"has the numpy dtype '{dtype}'", "Convert it to a dtype that numpy itself defines.")
    return plain


def _pack_array(value: Any, out: Outgoing) -> list[Any]:
    np = sys.modules["numpy"]
    dtype = _plain_dtype(np, value.dtype)
    flat, order = value, "C"
    in_order = value.flags.c_contiguous or value.flags.f_contiguous
    if not in_order and isinstance(out, BulkOutgoing) and out.gathers(value.nbytes):

        def write(to: memoryview) -> None:
            np.copyto(np.ndarray(value.shape, value.dtype, to), value)

        return [ARRAY.ext, dtype, list(value.shape), order, out.add_gathered(Gathered(value.nbytes, write))]
    if not value.flags.c_contiguous:
        flat, order = (value.T, "F") if value.flags.f_contiguous else (np.ascontiguousarray(value), "C")
    data = flat.reshape(-1).view(np.uint8).data if value.nbytes else b""
    return [ARRAY.ext, dtype, list(value.shape), order, out.add(data)]


def _pack_scalar(value: Any, _: Outgoing) -> list[Any]:
    np = sys.modules["numpy"]
    if isinstance(value, str):  # an array, and str() too, would lose null characters at its end
        return [SCALAR.ext, "U", "".join([value])]
    if isinstance(value, bytes):
        return [SCALAR.ext, "S", b"".join([value])]
    return [SCALAR.ext, _plain_dtype(np, value.dtype), np.asarray(value).tobytes()]


def _pack_dtype(value: Any, _: Outgoing) -> list[Any]:
    return [DTYPE.ext, _plain_dtype(sys.modules["numpy"], value)]


def _pack_tensor(value: Any, out: Outgoing) -> list[Any]:
    torch = sys.modules["torch"]
    if value.requires_grad:
        raise Stuck("is a tensor that requires grad", "Send tensor.detach().")
    if value.device.type != "cpu":
        raise Stuck(f"is a tensor on device '{value.device}'", _BY_VALUE)
    if value.layout is not torch.strided or value.is_nested:
        raise Stuck("is a sparse or nested tensor", "Send tensor.to_dense(), or its parts.")
    if value.is_quantized:
        raise Stuck("is a quantized tensor", "Send tensor.dequantize(), or tensor.int_repr() and its scales.")
    nbytes = value.numel() * value.itemsize
    if not value.is_contiguous() and isinstance(out, BulkOutgoing) and out.gathers(nbytes):

        def write(to: memoryview) -> None:
            torch.frombuffer(to, dtype=torch.uint8).view(value.dtype).reshape(value.shape).copy_(value)

        name = str(value.dtype).removeprefix("torch.")
        return [TENSOR.ext, name, list(value.shape), out.add_gathered(Gathered(nbytes, write))]
    flat = value.resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy()) if value.numel() else b""
    return [TENSOR.ext, str(value.dtype).removeprefix("torch."), list(value.shape), out.add(data)]


def _find_numpy(np: ModuleType, cls: type) -> Packer | None:
    if issubclass(cls, np.ndarray):
        if cls is not np.ndarray:
            raise Stuck(f"is a '{cls.__name__}', a kind of numpy array", "Send numpy.array(value).")
        return _pack_array
    if issubclass(cls, np.generic):
        return _pack_scalar
    return _pack_dtype if issubclass(cls, np.dtype) else None


def _find_torch(torch: ModuleType, cls: type) -> Packer | None:
    if issubclass(cls, torch.Tensor):
        if cls is not torch.Tensor:
            advice = "Send the plain tensor in it: parameter.detach(), or dtensor.to_local()."
            raise Stuck(f"is a '{cls.__name__}', a kind of tensor", advice)
        return _pack_tensor
    small: dict[type, Packer] = {
        torch.Size: lambda v, _: [SIZE.ext, list(v)],
        torch.dtype: lambda v, _: [TORCH_DTYPE.ext, str(v).removeprefix("torch.")],
        torch.device: lambda v, _: [DEVICE.ext, str(v)],
    }
    return small.get(cls)


def find_array_packer(cls: type) -> Packer | None:
    """The packer for a class of numpy or torch, if that library is loaded; else None."""
    for name, find, probe in (("numpy", _find_numpy, "dtype"), ("torch", _find_torch, "Tensor")):
        library = sys.modules.get(name)
        if library is not None and hasattr(library, probe) and (packer := find(library, cls)) is not None:
            return packer
    return None


def _pack_opaque_value(value: OpaqueValue, _: Outgoing) -> list[Any]:
    if value.kind == "numpy.generic":
        return [SCALAR.ext, *value.data]
    tags = {"numpy.dtype": DTYPE, "torch.Size": SIZE, "torch.dtype": TORCH_DTYPE, "torch.device": DEVICE}
    return [tags[value.kind].ext, list(value.data) if value.kind == "torch.Size" else value.data]


OPAQUE_PACKERS: dict[type, Packer] = {
    OpaqueArray: lambda v, out: [ARRAY.ext, v.dtype, list(v.shape), v.order, out.add(v.buffer)],
    OpaqueTensor: lambda v, out: [TENSOR.ext, v.dtype, list(v.shape), out.add(v.buffer)],
    OpaqueValue: _pack_opaque_value,
}
