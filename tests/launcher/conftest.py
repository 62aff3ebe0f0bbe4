"""A stand-in for the agent, run by the real command line and the real reaper: it reports what it was given."""

import json
import os
from pathlib import Path

import pytest

import miles_agents

AGENT = '''
"""Reports argv, key and environment to $FAKE_REPORT, then behaves as $FAKE_MODE says."""
import json, os, signal, sys
from pathlib import Path

with os.fdopen(int(os.environ["MILES_KEY_FD"])) as pipe:
    key = pipe.read()
mode = os.environ.get("FAKE_MODE", "obey")
if mode == "fail":
    sys.exit("fake agent: no such device")
if mode.isdigit():
    sys.exit(int(mode))
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
report = Path(os.environ["FAKE_REPORT"])
told = {"argv": sys.argv[1:], "key": key, "env": dict(os.environ), "pid": os.getpid(), "ppid": os.getppid()}
draft = report.with_suffix(f".{os.getpid()}")
draft.write_text(json.dumps(told) + "\\n")
draft.rename(report if "{" not in report.name else Path(str(report).format(sys.argv[sys.argv.index("--node") + 1])))
rest = sys.stdin.read()
if mode == "stubborn":
    signal.pause()
if mode == "echo":
    print("rest of stdin:", rest)
'''


@pytest.fixture
def fake_agent(tmp_path):
    """Environment in which ``python -m miles_agents.agent`` is the stand-in, and all else the real code."""
    real = Path(miles_agents.__file__).parent
    root = tmp_path / "path" / "miles_agents"
    (root / "agent").mkdir(parents=True)
    for source, target in ((real, root), (real / "agent", root / "agent")):
        for entry in source.iterdir():
            if entry.name not in {"agent", "__main__.py", "__pycache__"}:
                (target / entry.name).symlink_to(entry)
    (root / "agent" / "__main__.py").write_text(AGENT)
    return {**os.environ, "PYTHONPATH": str(root.parent), "FAKE_REPORT": str(tmp_path / "report.json")}


@pytest.fixture
def report(tmp_path):
    """What the stand-in told, or None as long as it has not."""

    def read(name="report.json"):
        path = tmp_path / name
        return json.loads(path.read_text()) if path.exists() else None

    return read
