"""A process that compares answers by algebra: one JSON request per line in, one JSON answer per line out.

It ends with its input, and by itself when a request takes longer than its deadline: whoever asks may be gone.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from miles.rollout.rm_hub.math_compare import equal_by_algebra

MEMORY_BYTES = 2 << 30


def main() -> None:
    """Serve until the input ends."""
    import sympy  # noqa: F401 - takes most of the start-up time: before the first request, not in its deadline

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.set_int_max_str_digits(4300)
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, float(request["deadline_s"]) + 5.0)  # its default action ends us
        _say({"equal": equal_by_algebra(request["given"], request["expected"])})
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _say(answer: dict[str, bool]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
