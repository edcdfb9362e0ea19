"""A real SLURM of two or more nodes on this machine: munged, slurmctld and slurmds, in a folder of the test's own.

Needs root and Debian's slurm-wlm and munge. Every daemon is stopped by the pid it wrote down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.free_ports import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def why_not() -> str | None:
    """The reason SLURM cannot be started here, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting SLURM's daemons needs root"


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster: cluster.run("sbatch", ...)`.

    Its nodes are n1, n2, ... settings: more lines of slurm.conf; kill_wait: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, folder: Path, *, num_nodes: int = 2, settings: str = "", kill_wait: int = 5) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._settings, self._kill_wait = settings, kill_wait
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["VENV"] = sys.prefix  # jobs run what the tests run, of several environments too
        self.environment.pop("OMP_NUM_THREADS", None)

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def run(self, *command: str, **options) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_for(self, job: str, timeout: float) -> str:
        """The final state of a job, e.g. COMPLETED."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            text = self.run("scontrol", "show", "job", job)
            state = next(word.removeprefix("JobState=") for word in text.split() if word.startswith("JobState="))
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return state
            time.sleep(1)
        return "TIMEOUT of the test"

    def processes(self, node: str) -> list[psutil.Process]:
        """Everything that runs on a node: its slurmd, and the tasks of jobs with the daemon above them."""
        found = {}
        if (pid_file := self.folder / f"slurmd.{node}.pid").exists():
            with contextlib.suppress(psutil.NoSuchProcess):
                slurmd = psutil.Process(int(pid_file.read_text()))
                found[slurmd.pid] = slurmd
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                variables = process.environ()
                if variables.get("SLURMD_NODENAME") != node or variables.get("SLURM_CONF") != str(
                    self.folder / "slurm.conf"
                ):
                    continue
                found[process.pid] = process
                for parent in process.parents():
                    if parent.name().startswith("slurmstepd"):
                        found[parent.pid] = parent
        return [*found.values()]

    def send(self, node: str, number: signal.Signals) -> None:
        """Send a signal to everything on a node. SIGSTOP: as if its power were off, to whoever waits for it."""
        for process in self.processes(node):
            _signal(process.pid, number)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", node)

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until every node is idle. A job that starts while its first start is cleared away can be lost."""
        deadline = time.monotonic() + seconds
        while set(self.run("sinfo", "--noheader", "--Node", "--format=%t").split()) != {"idle"}:
            assert time.monotonic() < deadline, self.run("sinfo")
            time.sleep(0.3)

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        munge = folder / "munge"
        munge.mkdir()
        key = munge / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (munge, key):
            shutil.chown(path, "munge", "munge")
        for parent in (munge, *munge.parents):  # munged wants to reach its socket, and others to connect to it
            if parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o755)
        socket_path = munge / "munge.socket"
        subprocess.run(
            [
                "runuser",
                "-u",
                "munge",
                "--",
                shutil.which("munged", path=_path()),
                f"--key-file={key}",
                f"--socket={socket_path}",
                f"--pid-file={munge / 'munged.pid'}",
                f"--log-file={munge / 'munged.log'}",
                f"--seed-file={munge / 'munged.seed'}",
                "--force",
            ],
            check=True,
        )
        ports = free_ports(1 + len(self.nodes))
        node_lines = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket_path}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait={self._kill_wait}
{node_lines}
PartitionName=all Nodes={",".join(self.nodes)} Default=YES MaxTime=INFINITE State=UP
{self._settings}
"""
        )
        self.run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle(30)

    def _stop(self) -> None:
        pid_files = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge/munged.pid"]
        pids = [int(path.read_text()) for path in pid_files if path.exists()]
        for pid in pids:
            _signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.1)
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        for node in self.nodes:  # jobs that nobody waited for
            self.send(node, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
