"""How fast things were noticed and cleaned up: kept with each test, shown at the end with ``-v``. Never asserted."""

import time

import pytest

_TOOK = "took: "


@pytest.fixture
def took(request):
    """``took("kill to error", at)``: the time since ``at`` (``time.perf_counter``), noted under that name."""

    def note(what, at):
        milliseconds = (time.perf_counter() - at) * 1000
        request.node.user_properties.append((_TOOK + what, f"{milliseconds:.1f} ms"))

    return note


def pytest_terminal_summary(terminalreporter):
    """A table of all that was noted."""
    if terminalreporter.verbosity < 1:
        return
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    rows = [(report.nodeid.rpartition("::")[2], *found) for report in reports for found in report.user_properties]
    rows = [row for row in rows if row[1].startswith(_TOOK)]
    if rows:
        terminalreporter.write_sep("=", "how fast")
    for name, what, value in rows:
        terminalreporter.write_line(f"{value:>12}  {what.removeprefix(_TOOK):<24} {name}")
