"""A real Slurm with one node, on this machine alone, for as long as a `with` block lasts; needs root.

Its four programs are children of this process, stopped at the end of the block, and by the kernel if this process dies
before that.  No systemd, no control groups, no accounting database; the node's one GPU is ``/dev/null``.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr")
DAEMONS = ("munged", "slurmctld", "slurmd")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# Daemons run as root and find each other through 127.0.0.1; what a node really has (memory, processors) is not looked
# at, so that the same jobs fit everywhere.  A finished job is remembered for five minutes: `squeue` is asked for it.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
{listen}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
MinJobAge=300
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=64000 Gres=gpu:1
PartitionName={partition} Nodes={host} Default=NO MaxTime=1-00:00:00 State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel hands out to connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = secrets.choice(range(20000, 32000))
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def listen_on_loopback_alone(host: str) -> str:
    """Setting that keeps ports off the network: Slurm binds to its host's name, so that name must lead to 127.0.0.1.

    Elsewhere the ports are open to the network, to those alone who have the key made for this test.
    """
    with contextlib.suppress(OSError):
        if socket.gethostbyname(host).startswith("127."):
            return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
    return ""


class Cluster:
    """A running Slurm, and its commands in a folder to put first on PATH."""

    partition = "lab"

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.logs = folder, folder / "commands", folder / "logs"
        self.conf = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        self.configure()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.stop)
            self.start()
            on_error.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def configure(self) -> None:
        """Write the configuration, the key and the commands."""
        for name in ("controller", "node", "logs", "munge", "commands"):
            (self.folder / name).mkdir()
        # munged wants a key that is its user's alone, and a socket that every user reaches.
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        controller_port, node_port = free_ports(2)
        self.conf.write_text(
            SLURM_CONF.format(
                host=host,
                listen=listen_on_loopback_alone(host),
                folder=self.folder,
                partition=self.partition,
                munge_socket=self.folder / "munge/socket",
                controller_port=controller_port,
                node_port=node_port,
            )
        )
        (self.folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        # Inside a job Snakemake's executor clears SLURM_CONF, so each command sets it again for itself.
        for name in CLIENTS:
            if program := shutil.which(name, path=SYSTEM_PATH):
                command = self.commands / name
                command.write_text(f'#!/bin/sh\nSLURM_CONF={self.conf} exec {program} "$@"\n')
                command.chmod(0o755)

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        munge = self.folder / "munge"
        self.launch(
            "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={self.logs}/munged.log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.wait_for((munge / "socket").exists)
        self.launch("slurmctld", "-D", "-f", str(self.conf))
        self.launch("slurmd", "-D", "-f", str(self.conf))
        self.wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%t", check=False).strip() == "idle")

    def launch(self, name: str, *arguments: str) -> None:
        """Start a daemon as a child that does not outlive this process."""
        program = shutil.which(name, path=SYSTEM_PATH)
        with (self.logs / f"{name}.txt").open("w") as log:
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", program, *arguments],
                    env={**os.environ, "SLURM_CONF": str(self.conf)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def wait_for(self, ready, seconds: float = 30) -> None:
        """Wait until something holds; a daemon that ends, or none that is ready in time, is an error with the logs."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                raise RuntimeError(f"Slurm did not start on this machine:\n{self.log()}")
            time.sleep(0.1)

    def ask(self, command: str, *arguments: str, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(
            [self.commands / command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=check,
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm itself says of every job, finished ones included."""
        lines = self.ask("scontrol", "--details", "--oneliner", "show", "job").splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if "JobId=" in line]

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(self.logs.iterdir()))

    def stop(self) -> None:
        """End jobs that still run, then the daemons."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.ask("scancel", "--full", "--user=root")
            end = time.monotonic() + 10
            while time.monotonic() < end and self.ask("squeue", "--noheader").strip():
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        # Without control groups Slurm loses sight of a cancelled job's processes that started a session of their own.
        for process in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def left_over(self) -> list[int]:
        """Processes that were started with this cluster's configuration."""
        mark = f"SLURM_CONF={self.conf}\0".encode()
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in file.read_bytes():
                    found.append(int(file.parent.name))
        return found
