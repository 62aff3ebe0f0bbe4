"""Encoding for the store: nothing is copied that can be copied once, later, and there is no limit."""

import numpy as np
import pytest
import torch

from miles_agents.wire.codec import CannotTravel, Gathered, decode, decode_bulk, encode, encode_bulk
from miles_agents.wire.codec_types import MAX_BODY_BYTES, MalformedBody, TooLarge


def through(value):
    """What arrives, with the buffers as a store would keep them."""
    body, buffers = encode_bulk(value)
    kept = []
    for buffer in buffers:
        data = bytearray(buffer.nbytes)
        if isinstance(buffer, Gathered):
            buffer.write(memoryview(data))
        else:
            data[:] = buffer
        kept.append(memoryview(data))
    return decode_bulk(body, kept), buffers


def test_what_lies_in_order_is_a_view_of_the_callers_memory():
    array, tensor = np.zeros(2000), torch.zeros(2000)
    _, buffers = encode_bulk({"a": [array], "t": (tensor,)})
    array[0], tensor[0] = 1, 1
    assert [bytes(buffer[:8]) != bytes(8) for buffer in buffers] == [True, True]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(60_000).reshape(200, 300)[::2, ::3],
        np.arange(60_000, dtype=">i2").reshape(3, 100, 200)[:, ::-1],
        np.zeros((100, 100), [("x", "<f4"), ("y", "<i8")])[::2],
        np.asfortranarray(np.arange(10_000).reshape(100, 100)),
    ],
)
def test_arrays_arrive_as_they_were(value):
    found, _ = through([value])
    assert found[0].dtype == value.dtype and found[0].shape == value.shape
    assert np.array_equal(found[0], value)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "complex64", "bool"])
def test_tensors_out_of_order_are_gathered(name):
    value = torch.randint(0, 2, (100, 90)).to(torch.float32).to(getattr(torch, name)).t()
    found, buffers = through({"t": value})
    assert isinstance(buffers[0], Gathered)
    assert found["t"].dtype == value.dtype
    assert found["t"].view(torch.uint8).equal(value.contiguous().view(torch.uint8))


def test_conjugates_and_negatives_arrive_as_what_they_mean():
    value = torch.complex(torch.arange(5000.0), torch.arange(5000.0)).reshape(50, 100)
    for odd in (value.conj(), value.t().conj(), value.conj().imag):
        found, _ = through(odd)
        assert found.equal(odd.resolve_conj().resolve_neg())


def test_small_ones_are_part_of_the_body():
    found, buffers = through([np.arange(10)[::2], torch.ones(3, 4).t()])
    assert buffers == [] and found[0].tolist() == [0, 2, 4, 6, 8]


def test_more_than_a_message_may_carry():
    value = [np.empty(MAX_BODY_BYTES // 2 + 10, np.uint8) for _ in range(2)]
    body, buffers = encode_bulk(value)
    assert len(buffers) == 2
    with pytest.raises(TooLarge):
        encode(value)
    assert len(decode_bulk(body, buffers)) == 2
    with pytest.raises(MalformedBody):
        decode(body, buffers, libraries="import")


def test_the_path_to_what_cannot_travel_is_told():
    with pytest.raises(CannotTravel, match=r"values\[3\]\['x'\]"):
        encode_bulk({"x": object()}, what="values[3]")
