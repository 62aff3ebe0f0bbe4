"""What goes into the bundle of ``benchmarks/gpu/bundle.py``: wheels, what of them is left out, and stand-ins.

The versions are those that ``docs/gpu.md`` names. torch, triton and CUDA's libraries are the machine's own.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PYTHON = "3.12"

# The versions matter: SGLang 0.5.16 imports names of them that later ones moved, or was compiled against them.
ENGINE = """
sglang==0.5.16 sglang-kernel==0.4.5 sglang-router==0.3.2 torch_memory_saver==0.0.10 apache-tvm-ffi==0.1.11
transformers==5.12.1 tokenizers==0.22.2 compressed-tensors==0.20.1 gguf==0.19.0 xgrammar==0.2.1 openai==2.6.1
openai-harmony==0.0.4
"""

TRAINER = "megatron-core==0.16.1 dill==0.4.1"

# What those and the project import. Where the machine has one of them, in any version, it can stay at home (--there).
COMMON = """
annotated-types==0.8.0 asttokens==3.0.2 cffi==2.1.1 decorator==5.3.1 distro==1.9.0 executing==2.3.0 fastapi==0.165.0
httptools==0.9.0 interegular==0.3.3 ipython==9.18.1 jedi==0.20.1 jiter==0.19.0 jsonschema==4.26.0
jsonschema-specifications==2025.9.1 loguru==0.7.3 matplotlib-inline==0.2.2 msgspec==0.22.0 opentelemetry-api==1.45.2
orjson==3.13.0 parso==0.8.7 partial-json-parser==0.2.1.1.post7 pexpect==4.9.0 prompt_toolkit==3.0.53 ptyprocess==0.7.0
pure_eval==0.2.4 pybase64==1.5.1 pydantic==2.14.4 pydantic_core==2.50.5 pylatexenc==2.11 python-multipart==0.0.34
pyzmq==27.3.0 referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 soundfile==0.14.0
stack-data==0.6.3 starlette==1.10.0 traitlets==5.16.1 typing-inspection==0.4.5 uvicorn==0.54.0 wcwidth==0.9.4
zstandard==0.25.0
"""

# Pattern of paths in the site directory -> why they are not needed there.
LEFT_OUT: Mapping[str, str] = {
    "sgl_kernel/flash_ops.abi3.so": "FlashAttention 3, 1.1 GB: not used with --sglang-attention-backend triton",
    "sgl_kernel/flashmla_ops.abi3.so": "attention of DeepSeek's models; SGLang says so where one is loaded",
    "sgl_kernel/infllm_ops.*": "sparse attention of the MiniCPM family",
    "sglang/multimodal_gen/*": "generation of images and video",
    "torch_memory_saver_*_cu12.abi3.so": "for CUDA 12",
    "zstandard/_cffi.*": "the backend of other interpreters than CPython",
    "jedi/third_party/*": "types of Django and the standard library, for completion at a prompt",
    "jsonschema/benchmarks/*": "its own benchmarks",
    "*/tests/*": "their tests; no package here imports them",
    "*.a": "static libraries",
}
ARCHITECTURES = ("sm90", "sm100")  # the directories of sgl_kernel, one of which is loaded: Hopper, Blackwell

# Symbols for debuggers, most of these libraries. Only libraries without code for the GPU are stripped.
STRIPPED = (
    "xgrammar/*.so",
    "sglang_router/*.so",
    "sglang/srt/grpc/*.so",
    "zstandard/*.so",
    "megatron/*.so",
    "openai_harmony/*.so",
)

NOT_FLASHINFER = '''"""Stands in for flashinfer, whose names SGLang imports whatever its flags say."""


def _missing(*arguments, **options):
    flags = "--sglang-sampling-backend pytorch --sglang-attention-backend triton"
    raise RuntimeError(f"flashinfer is not installed here; do without: {{flags}}")


{names}
'''
# SGLang 0.5.16 on CUDA: its sampler, and the attention of vision models, which the model registry imports.
FLASHINFER: Mapping[str, tuple[str, ...]] = {
    "flashinfer/__init__.py": (),
    "flashinfer/sampling.py": ("min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs"),
    "flashinfer/prefill.py": ("cudnn_batch_prefill_with_kv_cache",),
}

# For whatever runs on the machine: no hub can be reached, and the stand-in is not flashinfer.
ENVIRONMENT: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel by name and version."""

    name: str
    version: str

    @classmethod
    def of(cls, pin: str) -> Wheel:
        """Of ``name==version``."""
        name, _, version = pin.partition("==")
        return cls(normalised(name), version)

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    def is_file(self, filename: str) -> bool:
        """Whether a wheel of this file name is the pinned one."""
        name, _, rest = filename.partition("-")
        return filename.endswith(".whl") and normalised(name) == self.name and rest.partition("-")[0] == self.version


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(text: str) -> set[str]:
    """Names of distributions in a list of one a line, as ``pip freeze`` and ``pip list --format freeze`` write it."""
    found = (re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line) for line in text.splitlines())
    return {normalised(match[1]) for match in found if match}


def wheels(there: Iterable[str] = ()) -> list[Wheel]:
    """Those to pack for a machine that has the packages ``there``; engine and trainer come in any case."""
    have = {normalised(name) for name in there}
    common = [wheel for wheel in map(Wheel.of, COMMON.split()) if wheel.name not in have]
    return [Wheel.of(pin) for pin in (*ENGINE.split(), *TRAINER.split())] + common


def why_left_out(path: str, architecture: str) -> str:
    """The reason for which a file of the site directory is not packed, else an empty string."""
    for other in ARCHITECTURES:
        if other != architecture and fnmatch.fnmatchcase(path, f"sgl_kernel/{other}/*"):
            return f"kernels for {other}"
    return next((why for pattern, why in LEFT_OUT.items() if fnmatch.fnmatchcase(path, pattern)), "")


def is_stripped(path: str) -> bool:
    """Whether symbols are taken out of the file."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in STRIPPED)


def stand_ins() -> dict[str, str]:
    """Path in the site directory -> source, of modules that only have to be importable."""
    return {
        path: NOT_FLASHINFER.format(names="\n".join(f"{name} = _missing" for name in names)).rstrip() + "\n"
        for path, names in FLASHINFER.items()
    }
