"""megatron.core where there is no CUDA: its modules see a view of ``torch`` in which "cuda" means the CPU.

megatron.core names CUDA devices, generators and tensor types throughout. Rather than patching torch for everybody,
the global ``torch`` of each of its modules is replaced by a view that overrides what follows and passes on the rest;
code outside megatron.core sees the real torch. Nothing happens where CUDA exists.

There is one random generator on a CPU. The view of ``tensor_parallel.random`` therefore has a "CUDA" state, which is
it, and an empty "CPU" state: saving both would otherwise save it twice, and restoring them would undo each other.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.packed_seq_params",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.transformer.moe.experts",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.transformer_block",
)
"""All that the backend uses, imported before the views are put in place: what megatron.core imports later by itself
would see the real torch, and fail in the middle of a save."""

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "empty_like", "zeros_like")
_CPU = torch.device("cpu")

_installed = False


def install() -> None:
    """Import what of megatron.core is in use and, without CUDA, put the views in place. Once per process."""
    global _installed
    if _installed:
        return
    with warnings.catch_warnings():
        # It warns of each accelerator library that is absent.
        warnings.simplefilter("ignore")
        _import_all()
    _make_saves_synchronous()
    _mend_experts()
    if not torch.cuda.is_available():
        _put_views()
        _patch_tensor_methods()
    _silence()
    _installed = True


def _silence() -> None:
    """Warnings about megatron.core's own use of torch, in every rank and at every step. No user can act on them."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _import_all() -> None:
    # `megatron.core` itself imports most of its modules; their decorators take what this name means by then.
    jit = importlib.import_module("megatron.core.jit")
    if not torch.cuda.is_available():
        jit.disable_jit_fuser()
    for name in MODULES:
        importlib.import_module(name)


def _make_saves_synchronous() -> None:
    """A queue in place of a manager process, which takes seconds to start and is made to outlive us."""
    module: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    module._results_queue = queue.Queue()


def _mend_experts() -> None:
    """Without Transformer Engine the router asks for a name that was never imported; without CUDA the dispatcher takes
    counts for Python lists as they are."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available():
        return
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host


def _put_views() -> None:
    view = _view_of_torch()
    random_view = _view_of_torch()
    random_view.get_rng_state = lambda: torch.empty(0, dtype=torch.uint8)
    random_view.set_rng_state = lambda _: None
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = random_view if name == "megatron.core.tensor_parallel.random" else view  # type: ignore[attr-defined]
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _View(types.ModuleType):
    """A module with some names overridden; all others are those of the module below."""

    def __init__(self, below: types.ModuleType) -> None:
        super().__init__(below.__name__)
        self.__dict__["_below"] = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_below"], name)


def _view_of_torch() -> Any:
    view: Any = _View(torch)
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    view.cuda = _view_of_cuda()
    return view


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _view_of_cuda() -> Any:
    view: Any = _View(torch.cuda)
    view.current_device = lambda: _CPU
    view.set_device = view.synchronize = view.empty_cache = _nothing
    view.manual_seed = view.manual_seed_all = torch.manual_seed
    view.get_rng_state = lambda *_, **__: torch.get_rng_state()
    view.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    view.random = types.SimpleNamespace(get_rng_state=view.get_rng_state, set_rng_state=view.set_rng_state)
    view.Stream = view.Event = _Stream
    view.current_stream = view.default_stream = lambda *_: _Stream()
    view.stream = _entered
    return view


class _Stream:
    """A stream or event of a device that does everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.wait_stream = self.wait_event = self.record = self.wait = self.synchronize = _nothing

    def record_event(self, *_: Any) -> _Stream:
        """An event that has happened."""
        return self


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def _entered(_: object) -> Iterator[None]:
    yield


def _patch_tensor_methods() -> None:
    """``Tensor.type()`` and ``Tensor.cuda()``, for callers in megatron.core only: methods have no module to view."""
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        if not args and not kwargs and _called_by_megatron():
            return str(result).replace("torch.", "torch.cuda.", 1)
        return result

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]
    torch.Tensor.cuda = cuda  # type: ignore[assignment,method-assign]


def _called_by_megatron() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return isinstance(caller, str) and caller.startswith("megatron.core")
