"""What the zygote imports for this backend can be forked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
from miles_agents.worker.zygote_safety import Holdings, why_unsafe
before = Holdings.now()
import miles.backends.fsdp_utils.preload, sys
assert "transformers.models.qwen3.modeling_qwen3" in sys.modules
assert "torch.distributed.fsdp" in sys.modules
print("why:", why_unsafe(before) or "safe")
"""


@pytest.mark.full
def test_the_imports_leave_nothing_that_a_fork_would_break_or_share():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert "why: safe" in result.stdout, result.stdout + result.stderr
