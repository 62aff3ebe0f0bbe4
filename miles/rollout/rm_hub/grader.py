"""A process that compares answers by algebra: one JSON request per line in, one JSON answer per line out.

It ends with its input, and by itself when a request takes longer than its bounds: whoever asks may be gone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

from miles.rollout.rm_hub.algebra import warm_up
from miles.rollout.rm_hub.math_compare import equal_by_algebra

MEMORY_BYTES = 2 << 30
GRACE_S = 2.0
"""After a bound, for whoever asked to end this process."""


def main() -> None:
    """Serve until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints does not answer in our place
    warm_up()  # loading takes most of the start-up time: before the first request, not in its deadline
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out.write('{"ready": true}\n')
    out.flush()
    for line in sys.stdin:
        request = json.loads(line)
        # The default actions of both signals end us.
        signal.setitimer(signal.ITIMER_REAL, float(request["wall_s"]) + GRACE_S)
        signal.setitimer(signal.ITIMER_PROF, float(request["cpu_s"]) + GRACE_S)
        out.write(json.dumps({"equal": _equal(request["given"], request["expected"])}) + "\n")
        out.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _equal(given: str, expected: str) -> bool:
    try:
        return equal_by_algebra(given, expected)
    except (ValueError, RecursionError, MemoryError, OverflowError):
        return False


if __name__ == "__main__":
    main()
