"""Entry of TRL's process: ``python -m main_job_bench.trl_child``; arguments as ``trl_side`` says."""

from __future__ import annotations

import sys

from main_job_bench import trl_side

if __name__ == "__main__":
    sys.exit(trl_side.main(sys.argv[1:]))
