"""Names of test cases that are the same in every process, as tests that are shared out among processes need them."""

from __future__ import annotations

import re


def case_id(value: object) -> str:
    """``repr``, short, in ASCII and without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:40].encode("ascii", "replace").decode()
