"""A real SLURM on this machine: munge, a controller and three nodes that are processes here, in a folder of their own.

Nothing of the machine's own SLURM, if it has one, is touched. Nodes say that they have 8 CPUs and 2 GPUs each, which
nobody checks: ranks take turns on what there is.
"""

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from foxdist.ports import free_port

from runs import environment

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
NODES = 3
ROOT = Path(__file__).parent.parent
CONFIGURATION = """
ClusterName=foxdist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Of a requeued job SLURM waits until its old credentials are worthless: two minutes, if it is not told otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=60
# On a busy machine: an order that SLURM takes for lost comes again, a minute later, to what then has the same number.
MessageTimeout=90
MinJobAge=600
# The port where ranks meet is made of the job's number, and another cluster of tests may be on this machine.
FirstJobId={first}
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldParameters=enable_configless
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
# Jobs of `urgent` take the nodes of others, which have time to end and wait for their turn then.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 GraceTime=120 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """A running cluster; `close` ends it. Raises `RuntimeError` with the daemons' words if it does not come up."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        self.environment = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "FOXDIST_PYTHON": sys.executable}
        self._write()
        key, place = folder / "munge.key", folder / "munge"
        self.call("mungekey", "--create", f"--keyfile={key}")
        files = [f"--{name}-file={place}.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *files)
        self._until((folder / "munge.socket").exists, 10)
        self._start("slurmctld", "-D", "-c")
        for i in range(NODES):
            self._start("slurmd", "-D", "-N", f"node{i + 1}")
        self._until(lambda: self._idle() == NODES, 30)

    def _write(self) -> None:
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName=node{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 Gres=gpu:2"
            for i in range(NODES)
        ]
        text = CONFIGURATION.format(
            host=host,
            first=random.randrange(1, 60000),
            port=free_port(),
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
        for name in ("state", *(f"spool-node{i + 1}" for i in range(NODES))):
            (self.folder / name).mkdir()

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{program}.log").open("w") as log:
            self._daemons.append(
                subprocess.Popen([_find(program), *arguments], env=self.environment, stdout=log, stderr=log)
            )

    def call(self, program: str, *arguments: str, **environment: str) -> str:
        """What a program of SLURM prints. Raises `RuntimeError` with what it says if it fails."""
        found, variables = _find(program), self.environment | environment
        done = subprocess.run([found, *arguments], env=variables, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _until(self, condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                logs = [path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("SLURM does not come up:\n" + "\n".join(logs))
            time.sleep(0.05)

    def _idle(self) -> int:
        try:
            return int(self.call("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)
        except RuntimeError:  # not up yet
            return 0

    def close(self) -> None:
        """Cancels all jobs, and ends all daemons."""
        with contextlib.suppress(RuntimeError):  # what follows ends them, too
            self.call("scancel", "--user", getpass.getuser())
            self._until(lambda: not self.call("squeue", "-h"), 100)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def install() -> None:
    """SLURM and munge, where they are not there. Skips the test, with the reason, where they cannot be had."""
    missing = [program for program in PROGRAMS if not _find(program)]
    if not missing:
        return
    why = None
    if not shutil.which("apt-get"):
        why = "this system has no apt-get"
    elif os.geteuid():
        why = "only root may install packages"
    else:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                why = f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}"
                break
    if why:
        pytest.skip(f"NOTHING OF SLURM IS TESTED: {', '.join(missing)} not installed, and {why}")


@contextlib.contextmanager
def running():
    """A cluster of three nodes, node1 to node3, installed if need be."""
    install()
    folder = Path(tempfile.mkdtemp(prefix="foxdist-slurm-"))
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)
