"""A real Slurm: its controller and several node daemons on this machine, in a directory of their own.

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge (``scripts/test.sh`` installs them where it
is root). Nothing of the machine's own configuration is used or changed, and all daemons are ended by their pids.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from support.procs import eventually_sync

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo", "squeue", "scontrol")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_START_S = 60.0

CONF = """\
ClusterName=miles
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=5
OverTimeLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_for_slurm():
    """What this machine lacks for it; empty if it can be started."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return [*missing, *([] if os.geteuid() == 0 else ["root"])]


class SlurmCluster:
    """``nodes`` n1, n2, ... of 4 CPUs each. ``env``: what its commands need."""

    def __init__(self, here, num_nodes):
        self.here = here
        self.nodes = [f"n{number + 1}" for number in range(num_nodes)]
        self.daemons = {}
        path = f"{os.environ.get('PATH', '')}:{PATH}"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(here / "slurm.conf"),
            "PATH": path,
        }

    def begin(self):
        key = self.here / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self.here / "state").mkdir()
        host, ports = socket.gethostname().partition(".")[0], _free_ports(len(self.nodes) + 1)
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        conf = CONF.format(host=host, port=ports[0], here=self.here, nodes="\n".join(lines))
        (self.here / "slurm.conf").write_text(conf)
        self._daemon("munged", "munged", "-F", "--force", "--num-threads=2", f"--key-file={key}",
            f"--socket={self.here}/munge.socket", f"--pid-file={self.here}/munged.pid",
            f"--log-file={self.here}/munged.log", f"--seed-file={self.here}/munge.seed")  # fmt: skip
        eventually_sync((self.here / "munge.socket").exists, _START_S, what="munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        eventually_sync(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), _START_S, what="nodes are idle")

    def _daemon(self, name, program, *flags):
        with open(self.here / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program, path=PATH), *flags], env=self.env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip

    def start_node(self, node):
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node):
        """As if its power went: the daemon, what it started, and all below."""
        steps = [p for p in psutil.process_iter(["cmdline"]) if self._is_stepd_of(p, node)]
        victims = [*steps, *(child for step in steps for child in step.children(recursive=True))]
        self.daemons[node].kill()
        self.daemons[node].wait(10)
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue

    def _is_stepd_of(self, process, node):
        try:
            if "slurmstepd" not in process.name():
                return False
            files = {mapping.path for mapping in process.open_files()}
            return any(f"slurmd-{node}.log" in path for path in files)
        except psutil.Error:
            return False

    def run(self, *command, timeout=60, **more):
        return subprocess.run(
            command, env={**self.env, **more}, capture_output=True, text=True, timeout=timeout, check=False
        )

    def states(self):
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").stdout.split("\n")
        return dict(line.split() for line in lines if line.strip())

    def job_state(self, job):
        """``COMPLETED:0`` and the like, from Slurm's own record."""
        told = self.run("scontrol", "-o", "show", "job", str(job)).stdout
        words = dict(word.partition("=")[::2] for word in told.split())
        return words.get("JobState", ""), words.get("ExitCode", "")

    def end(self):
        """Jobs first; then the daemons, in the order that lets each say goodbye."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.run("scancel", "--full", "--user=root")
            self.run("scancel", "--signal=KILL", "--user=root")
            with suppress(AssertionError):  # their processes are looked for below
                eventually_sync(lambda: not self.run("squeue", "-h").stdout.strip(), 20)
        for name in [*self.nodes, "slurmctld", "munged"]:
            daemon = self.daemons.get(name)
            if daemon is not None and daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(10)
        _end_leftovers(str(self.here))


def _end_leftovers(here):
    """Step daemons of this cluster, which are nobody's children: they have a log of its directory open."""
    deadline = time.monotonic() + 10
    while True:
        left = []
        for process in psutil.process_iter(["name"]):
            try:
                if "slurmstepd" in process.info["name"] and any(here in f.path for f in process.open_files()):
                    left.append(process)
            except psutil.Error:
                continue
        if not left:
            return
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
        time.sleep(0.1)


def _free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def slurm_cluster(here: Path, num_nodes: int = 3):
    """The cluster, running."""
    cluster = SlurmCluster(here, num_nodes)
    try:
        cluster.begin()
        yield cluster
    finally:
        cluster.end()
