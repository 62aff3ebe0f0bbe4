"""``ray start`` here and by ssh on all other hosts at once, then actors on each: ``ray_child.py SETTINGS``, as JSON.

Writes ``ready`` when all actors have answered, then waits to be ended together with the hosts.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PORT = 6379
_COMMON = ("--num-cpus", "{ranks}", "--object-store-memory", str(256 << 20), "--disable-usage-stats")


class HasModules:
    """Imports them in its constructor."""

    def __init__(self, path: list[str], modules: list[str]) -> None:
        sys.path.extend(path)
        for name in modules:
            importlib.import_module(name)

    def ready(self) -> bool:
        """Answers."""
        return True


def main(wanted: dict[str, Any]) -> None:
    """Start, say so, stay."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    common = [word.format(ranks=wanted["ranks"]) for word in _COMMON]
    (_, address), *others = wanted["addresses"].items()
    importing = threading.Thread(target=importlib.import_module, args=("ray",))
    importing.start()
    where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--node-ip-address={address}"]
    subprocess.run([ray_command, "start", *where, *common], check=True, stdout=subprocess.DEVNULL)
    ssh = ["ssh", "-F", wanted["ssh_config"], "-o", "BatchMode=yes"]
    joins = [
        subprocess.Popen(
            [*ssh, host, ray_command, "start", f"--address={address}:{PORT}", f"--node-ip-address={own}", *common],
            stdout=subprocess.DEVNULL,
        )
        for host, own in others
    ]
    importing.join()
    ray = importlib.import_module("ray")
    ray.init(address=f"{address}:{PORT}", log_to_driver=False)
    while sum(node["Alive"] for node in ray.nodes()) < len(wanted["addresses"]):
        time.sleep(0.02)
    by_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    actors = [
        ray.remote(num_cpus=1, scheduling_strategy=by_node(node["NodeID"], soft=False))(HasModules).remote(
            wanted["path"], wanted["modules"]
        )
        for node in ray.nodes()
        for _ in range(wanted["ranks"])
    ]
    ray.get([actor.ready.remote() for actor in actors])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for join in joins:
        join.wait()
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
