"""Memory that sleeps: views of storages, and where they are kept."""

import gc
import weakref

import torch

from miles.backends.training_utils.storages import _memory


def test_a_view_of_a_storage_keeps_it_alive():
    """What is written to a disk from a GPU are copies that nobody else holds."""
    storage = torch.arange(200, dtype=torch.uint8).untyped_storage()
    alive = weakref.ref(storage)
    view = _memory(storage)
    del storage
    gc.collect()
    assert alive() is not None and bytes(view) == bytes(range(200))
    del view
    gc.collect()
    assert alive() is None
