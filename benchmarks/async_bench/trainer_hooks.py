"""The training side of the benchmark: on a core of its own, and a step as long as it is told (environment variables).

A real step of a small model is a fraction of a second; the rest is slept, so that a step takes about what generation
takes and does not depend on what else the machine does.
"""

from __future__ import annotations

import os
import time
from typing import Any


def pin(_args: Any) -> None:
    """``--custom-megatron-init-path``: to the core of ``ASYNC_BENCH_CORE``."""
    os.sched_setaffinity(0, {int(os.environ["ASYNC_BENCH_CORE"])})


def lengthen(*_: Any) -> None:
    """``--custom-megatron-before-train-step-hook-path``: sleep for ``ASYNC_BENCH_STEP_S``."""
    time.sleep(float(os.environ["ASYNC_BENCH_STEP_S"]))
