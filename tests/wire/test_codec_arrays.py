"""Arrays and tensors: every dtype, without copies, and through processes that do not have the library."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from miles_agents.wire.codec import CannotTravel, MalformedBody, OpaqueArray, OpaqueTensor, decode, encode
from miles_agents.wire.transport import ZERO_COPY_BYTES

NUMPY_DTYPES = [
    *("?", "i1", "u1", "<i2", ">i2", "u4", "i8", ">u8", "f2", "f4", ">f8", "g", "F", "D", "G"),
    *("S5", "<U3", ">U3", "M8[ns]", "<m8[25s]", "M8", "V7"),
    [("a", "i4"), ("b", "U2", (2, 3)), ("c", [("d", ">f8")])],
]


def round_trip(value, *, writable=True):
    body, buffers = encode(value)
    arrived = [bytearray(b) if writable else bytes(b) for b in buffers]
    return decode(body, arrived, libraries="import")


def raw(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 2, count, dtype=np.uint8)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4), (200, 500)])
def test_arrays_of_every_dtype_and_shape_arrive(dtype, shape):
    dtype = np.dtype(dtype)
    array = np.ndarray(shape, dtype, raw(max(1, int(np.prod(shape))) * dtype.itemsize).tobytes())
    got = round_trip(array)
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert got.flags.writeable


@pytest.mark.parametrize("dtype", NUMPY_DTYPES[:-1], ids=str)
def test_numpy_scalars_and_dtypes_arrive(dtype):
    scalar = np.zeros((), dtype)[()]
    got = round_trip([scalar, np.dtype(dtype)])
    assert type(got[0]) is type(scalar)
    assert got[0].dtype == scalar.dtype
    assert got[0] == scalar or np.isnat(scalar)
    assert got[1] == np.dtype(dtype)


def test_numpy_texts_keep_their_null_characters():
    value = [np.str_("a\0"), np.bytes_(b"b\0"), np.str_("")]
    got = round_trip(value)
    assert got == value
    assert list(map(type, got)) == list(map(type, value))


def test_an_aligned_structured_dtype_keeps_its_offsets():
    dtype = np.dtype([("a", "i1"), ("b", "f8", (2, 3)), ("c", "U0")], align=True)
    got = round_trip(np.zeros(3, dtype))
    assert got.dtype == dtype
    assert got.dtype.isalignedstruct


def test_a_numpy_float_does_not_become_a_python_float():
    assert type(round_trip({"loss": np.float64(1.5)})["loss"]) is np.float64


def test_large_arrays_are_views_on_both_sides():
    array = np.arange(ZERO_COPY_BYTES, dtype=np.float32)
    body, (buffer,) = encode({"a": array})
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)
    frame = bytearray(buffer)
    got = decode(body, [frame], libraries="import")["a"]
    assert np.shares_memory(got, np.frombuffer(frame, np.uint8))
    read_only = decode(body, [bytes(frame)], libraries="import")["a"]
    assert not read_only.flags.writeable


def test_a_transposed_array_is_sent_without_a_copy_and_a_strided_one_as_its_elements():
    array = np.arange(ZERO_COPY_BYTES, dtype=np.float32).reshape(64, -1)
    _, (buffer,) = encode(array.T)
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)
    got = round_trip(array.T)
    assert np.array_equal(got, array.T)
    assert got.flags.f_contiguous
    part = array[::2, ::2]
    _, (buffer,) = encode(part)
    assert buffer.nbytes == part.nbytes
    assert np.array_equal(round_trip(part), part)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([object()]), "object"),
        (np.array([("a", 1)], dtype=[("x", "O"), ("y", "i4")]), "dtype"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), "dtype"),
        (np.ma.array([1]), "MaskedArray"),
        (np.rec.array([(1,)], dtype=[("a", "i4")]), "recarray"),
    ],
    ids=["object", "field", "StringDType", "masked", "record"],
)
def test_arrays_that_would_change_are_refused_with_their_path(value, reason):
    with pytest.raises(CannotTravel, match=reason) as caught:
        encode({"x": [value]})
    assert caught.value.fields["path"] == "['x'][0]"


TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint64, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def same_tensor(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (
        a.numel() == 0
        or torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4), (300, 400)])
@pytest.mark.parametrize("writable", [True, False])
def test_tensors_of_every_dtype_and_shape_arrive(dtype, shape, writable):
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.from_numpy(raw(count)) if count else torch.empty(0, dtype=torch.uint8)
    tensor = data.view(dtype).reshape(shape)
    got = round_trip(tensor, writable=writable)
    assert type(got) is torch.Tensor
    assert same_tensor(got, tensor)


def test_large_tensors_are_views_on_both_sides():
    tensor = torch.arange(ZERO_COPY_BYTES, dtype=torch.float32).to(torch.bfloat16)
    body, (buffer,) = encode([tensor])
    assert np.frombuffer(buffer, np.uint8).ctypes.data == tensor.data_ptr()
    frame = bytearray(buffer)
    (got,) = decode(body, [frame], libraries="import")
    assert got.data_ptr() == np.frombuffer(frame, np.uint8).ctypes.data
    assert same_tensor(got, tensor)


def test_a_read_only_frame_gives_a_tensor_of_its_own_without_a_warning():
    frame_source = torch.zeros(ZERO_COPY_BYTES, dtype=torch.uint8)
    body, (buffer,) = encode(frame_source)
    frame = bytes(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decode(body, [frame], libraries="import")
    got[0] = 7
    assert frame[0] == 0


def test_a_misaligned_frame_gives_an_aligned_tensor():
    tensor = torch.arange(ZERO_COPY_BYTES, dtype=torch.int64)
    body, (buffer,) = encode(tensor)
    shifted = bytearray(buffer.nbytes + 1)
    shifted[1:] = buffer
    got = decode(body, [memoryview(shifted)[1:]], libraries="import")
    assert got.data_ptr() % 8 == 0
    assert torch.equal(got, tensor)


def test_a_view_into_a_large_storage_sends_only_its_own_elements():
    storage = torch.zeros(1000, 1000)
    assert encode(storage[0])[1] == []
    _, (buffer,) = encode(storage[:, :100])
    assert buffer.nbytes == 1000 * 100 * 4
    got = round_trip(torch.arange(12).reshape(3, 4).t())
    assert torch.equal(got, torch.arange(12).reshape(3, 4).t())


def test_lazily_conjugated_tensors_arrive_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal(round_trip(tensor.conj()), tensor.conj().resolve_conj())
    assert torch.equal(round_trip(tensor.conj().imag), tensor.conj().imag.resolve_neg())


def test_sizes_dtypes_and_devices_arrive():
    value = {"size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cuda", 1)}
    got = round_trip(value)
    assert got == value
    assert type(got["size"]) is torch.Size


def refused_tensors():
    import torch.nn as nn

    parameter = nn.Parameter(torch.zeros(2))
    yield "requires_grad", torch.zeros(2, requires_grad=True), "requires grad"
    yield "graph", torch.zeros(2, requires_grad=True) * 2, "requires grad"
    yield "parameter", parameter, "Parameter"
    yield "frozen parameter", nn.Parameter(torch.zeros(2), requires_grad=False), "Parameter"
    yield "meta", torch.zeros(2, device="meta"), "device 'meta'"
    yield "sparse", torch.zeros(2, 2).to_sparse(), "sparse"


@pytest.mark.parametrize(("tensor", "reason"), [pytest.param(t, r, id=i) for i, t, r in refused_tensors()])
def test_tensors_that_cannot_travel_are_refused_by_name(tensor, reason):
    with pytest.raises(CannotTravel, match=reason) as caught:
        encode({"weights": (1, tensor)}, what="arguments")
    assert caught.value.fields["path"] == "['weights'][1]"
    assert caught.value.advice.startswith(("Send", "Weights"))


MIXED = """
import sys
from miles_agents.wire.codec import decode, encode
body = bytes.fromhex(sys.stdin.readline())
frames = [bytes.fromhex(line) for line in sys.stdin]
value = decode(body, frames, libraries="opaque")
names = [type(v).__name__ for v in value]
again, buffers = encode(value)
assert not {"numpy", "torch"} & set(sys.modules), "a library was imported"
sys.stdout.write(" ".join(names) + chr(10) + again.hex() + chr(10))
sys.stdout.writelines(bytes(b).hex() + chr(10) for b in buffers)
"""


def test_a_process_without_the_libraries_passes_values_on_exactly():
    value = [
        np.arange(6, dtype=">f4").reshape(2, 3).T,
        np.zeros(3, [("a", "i4"), ("b", "S2", (2,))]),
        np.arange(20_000),
        np.float32(2.5),
        np.dtype("f8"),
        torch.zeros(2, 3, dtype=torch.float8_e4m3fn),
        torch.arange(50_000, dtype=torch.bfloat16),
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cpu"),
    ]
    body, buffers = encode(value)
    text = "\n".join([body.hex(), *(bytes(b).hex() for b in buffers)])
    done = subprocess.run([sys.executable, "-c", MIXED], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, again, *frames = done.stdout.splitlines()
    assert names.split() == ["OpaqueArray"] * 3 + ["OpaqueValue"] * 2 + ["OpaqueTensor"] * 2 + ["OpaqueValue"] * 3
    assert bytes.fromhex(again) == body
    assert [bytes.fromhex(f) for f in frames] == [bytes(b) for b in buffers]


def test_opaque_values_can_be_made_by_hand_and_arrive_real():
    got = round_trip([OpaqueTensor("int16", (2,), b"\1\0\2\0"), OpaqueArray("<i2", (1, 2), "C", b"\1\0\2\0")])
    assert torch.equal(got[0], torch.tensor([1, 2], dtype=torch.int16))
    assert got[1].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "value",
    [
        OpaqueTensor("float32", (3,), b"1234"),
        OpaqueTensor("float32", (2**40, 2**40), b"1234"),
        OpaqueTensor("float32", (-1,), b"1234"),
        OpaqueTensor("load", (4,), b"1234"),
        OpaqueTensor("__name__", (4,), b"1234"),
        OpaqueArray("<f4", (3,), "C", b"1234"),
        OpaqueArray("<f4", (2**62, 0), "C", b""),
        OpaqueArray("<f4", (1,), "K", b"1234"),
        OpaqueArray("O", (1,), "C", b"12345678"),
        OpaqueArray("|O8", (1,), "C", b"12345678"),
        OpaqueArray("i4,O", (1,), "C", b"12345678"),
        OpaqueArray(["struct", ["a"], ["<f8"], [2**40], 8, False], (1,), "C", b"12345678"),
        OpaqueArray(["sub", "<f8", [2**40]], (1,), "C", b"12345678"),
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_descriptions_that_do_not_fit_their_buffer_are_malformed(value):
    body, buffers = encode(value)
    with pytest.raises(MalformedBody):
        decode(body, buffers, libraries="import")
