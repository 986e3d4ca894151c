"""A SLURM cluster of several nodes on this machine: munged, slurmctld and a slurmd for each node, in a directory of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.end_to_end.runs import TIMEOUT_SECONDS, environment, wait_until
from tests.ports import free_ports

NODES = ("127.0.0.11", "127.0.0.12", "127.0.0.13", "127.0.0.14")
"""Nodes are named as the addresses that they answer at, so that no system file needs to know them."""
CORES_PER_NODE = 4
GPUS_PER_NODE = 2
_DAEMONS = ("munged", "slurmctld", "slurmd")
_SBIN = "/usr/sbin"


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [
        name for name in (*_DAEMONS, "sbatch") if shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}") is None
    ]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): run tests/slurm/install.sh"
    if os.geteuid() != 0:
        return "the daemons of a Slurm cluster must be started by root"
    return None


class Cluster:
    """Four nodes of 4 cores and 2 GPUs each, none of them real: whatever runs shares this machine.

    Partitions: `main`, the default; `urgent`, for whose jobs those of `main` are put back into the queue; `small`, of the
    first two nodes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_configuration()
        self.environment = environment(SLURM_CONF=str(directory / "slurm.conf"))
        self._mark = f"SLURM_CONF={directory / 'slurm.conf'}".encode()

    def start(self) -> None:
        """Starts the daemons and waits until all nodes are idle."""
        options = ["--force", "--foreground", f"--key-file={self._key}", f"--socket={self._socket}", "--num-threads=2"]
        places = [f"--{name}-file={self.directory / f'munged.{name}'}" for name in ("log", "pid", "seed")]
        self._start("munged", *options, *places)
        wait_until(self._socket.exists, "munged's socket")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, "all nodes idle")

    def stop(self) -> None:
        """Ends every job and daemon; no process of the cluster is left."""

        def gone() -> bool:
            left = self.processes()  # and what those have started since they were last looked for
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in left:
                    _send(pid, number)
            return not left

        wait_until(gone, "every process of the cluster gone")
        for process in self._processes.values():
            process.wait()

    def processes(self) -> list[int]:
        """Everything that runs on behalf of the cluster: its daemons, and what jobs started."""
        marked = [
            pid for pid in _all_processes() if self._mark in _read(pid, "environ").split(b"\0") and pid != os.getpid()
        ]
        return sorted({*marked, *self._step_daemons(str(self.directory))})

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """The node is gone without a word: its slurmd, what watches over its jobs, and the jobs themselves."""
        daemon = self._processes.pop(f"slurmd-{node}")
        # Another cluster on this machine has a node of the same name.
        marks = {f"SLURMD_NODENAME={node}".encode(), self._mark}
        jobs = [pid for pid in _all_processes() if marks <= set(_read(pid, "environ").split(b"\0"))]
        gone = [daemon.pid, *self._step_daemons(str(self.directory / f"slurmd-{node}.log")), *jobs]
        # Nobody may have a moment in which to tell of another one's end.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in gone:
                _send(pid, number)
        daemon.wait()

    def run(self, *arguments: object, check: bool = True) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            [str(argument) for argument in arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def node_states(self) -> dict[str, str]:
        lines = self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False
        ).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines if line.startswith("127.")}

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of a task of an array."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.splitlines()[0].split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for_state(self, job: str, *states: str, seconds: float = TIMEOUT_SECONDS) -> str:
        """Waits until the job is in one of these states; which one."""

        def reached() -> bool:
            time.sleep(0.1)
            return self.state(job) in states

        wait_until(reached, f"{' or '.join(states)} of job {job}", seconds)
        return self.state(job)

    def wait_until_idle(self) -> None:
        """Waits until nothing runs and every node is back; nodes that were killed are started again."""
        for node in NODES:
            if f"slurmd-{node}" not in self._processes:
                self.start_node(node)

        def idle() -> bool:
            states = self.node_states()
            for node, state in states.items():
                if state.startswith(("down", "drain")):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            time.sleep(0.1)
            return set(states.values()) == {"idle"} and not self.run("squeue", "--noheader").strip()

        wait_until(idle, "an idle cluster")

    def _start(self, name: str, *options: str, program: str | None = None) -> None:
        log = (self.directory / f"{name}.out").open("ab")
        with log:
            self._processes[name] = subprocess.Popen(
                [f"{_SBIN}/{program or name}", *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _step_daemons(self, place: str) -> list[int]:
        """The processes that stand between slurmd and jobs, which have wiped their environment, by a file that they hold."""
        found = []
        for pid in _all_processes():
            if _read(pid, "cmdline").startswith(b"slurmstepd"):
                with contextlib.suppress(OSError):
                    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
                    found += [pid] if any(link.startswith(place) for link in links) else []
        return found

    def _write_configuration(self) -> None:
        (self.directory / "state").mkdir()
        self._key = self.directory / "munge.key"
        self._socket = self.directory / "munge.socket"
        self._key.write_bytes(secrets.token_bytes(128))
        self._key.chmod(0o400)
        devices = [self.directory / f"gpu{number}" for number in range(GPUS_PER_NODE)]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        (self.directory / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={self.directory}/gpu[0-{GPUS_PER_NODE - 1}]\n" for node in NODES)
        )
        ports = free_ports(len(NODES) + 1)
        nodes = [
            f"NodeName={node} NodeAddr={node} NodeHostname={socket.gethostname()} Port={port} CPUs={CORES_PER_NODE} "
            f"RealMemory=100000 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        (self.directory / "slurm.conf").write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                host=socket.gethostname(),
                port=ports[0],
                first_job=1 + secrets.randbelow(1_000_000),
                nodes="\n".join(nodes),
                all=",".join(NODES),
                small=",".join(NODES[:2]),
                socket=self._socket,
            )
        )


# Credentials that expire soon, because a job that is put back into the queue waits for that. All other times are those that a
# daemon may stand still on a machine that has much else to do; a node is lost soon enough all the same. Jobs begin at a number
# of this cluster's own: their workers meet at ports that are made of it, and another cluster may be on this machine.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=10
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
ReturnToService=1
KillWait=3
SlurmdTimeout=15
InactiveLimit=0
MessageTimeout=60
BatchStartTimeout=120
FirstJobId={first_job}
MinJobAge=86400
MaxArraySize=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PrologFlags=NoHold
{nodes}
PartitionName=main Nodes={all} Default=YES MaxTime=1-00:00:00 DefaultTime=10 State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes={all} MaxTime=1-00:00:00 DefaultTime=10 State=UP PriorityTier=10
PartitionName=small Nodes={small} MaxTime=60 DefaultTime=10 State=UP PriorityTier=1
"""


def _all_processes() -> list[int]:
    return [int(process.name) for process in Path("/proc").glob("[0-9]*")]


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty for a process that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
