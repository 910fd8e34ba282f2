"""A SLURM cluster on loopback: munged, one slurmctld and a slurmd a node, as the user who runs the tests, in one folder.

Nothing of the machine's own SLURM is touched: its ports, sockets, keys and configuration are this cluster's alone.
"""

import getpass
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_hybrid.launch.environment import free_port

NODES = ("first", "second")
DAEMONS = ("munged", "slurmctld", "slurmd")
PORTS = range(32000, 32768)
"""Of daemons: neither where ranks meet nor what Linux hands out."""
# cred_expire is also how long a requeued job waits before it may start again (120 s by default). FirstJobId: where ranks meet
# depends on the job's number, and another cluster's jobs may run on this machine.
CONFIG = """
ClusterName=tests
FirstJobId={job}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=30
MpiDefault=none
MailProg=/bin/true
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
NodeName={nodes[1]} NodeAddr=127.0.0.2 Port={ports[2]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """The condition's first true value.

    Raises:
        TimeoutError: it stayed false; `what` says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not after {seconds:.0f} s")


def find_daemon(name: str) -> str | None:
    """Return the path of a daemon, or None if it is not installed."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Starts the daemons, and stops them by their process ids."""

    def __init__(self, folder: Path):
        self.folder, self._daemons = folder, []
        folder.chmod(0o755)  # munged insists
        ports = [free_port(PORTS[i::3]) for i in range(3)]  # no two alike
        (folder / "state").mkdir()
        config = CONFIG.format(
            user=getpass.getuser(), folder=folder, ports=ports, nodes=NODES, cpus=os.cpu_count(),
            job=1 + secrets.randbelow(1_000_000),
        )  # fmt: skip
        (folder / "slurm.conf").write_text(config)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "OMPI_"))}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> "Cluster":
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
                     f"--log-file={self.folder}/munged.log", f"--pid-file={self.folder}/munged.pid",
                     f"--seed-file={self.folder}/munged.seed")  # fmt: skip
        wait_for((self.folder / "munge.socket").exists, "munged's socket", 20)
        self._daemon("slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf")
        wait_for(lambda: self.usable_nodes() == set(NODES), "nodes to become idle", 30)
        return self

    def _daemon(self, program: str, *arguments) -> None:
        path = find_daemon(program)
        assert path is not None, program
        with open(self.folder / f"{program}.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen([path, *map(str, arguments)], stdout=out, stderr=out, env=self.environment)
            )

    def stop(self) -> None:
        """End the daemons, and whatever of a job is still there, by process id."""
        for daemon in reversed(self._daemons):
            family = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            for process in family:
                if process.is_running():
                    process.kill()

    def logs(self) -> str:
        """The ends of what the daemons wrote."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files)

    def run(self, *command, **environment: str) -> subprocess.CompletedProcess:
        """A command with this cluster's configuration, output captured."""
        return subprocess.run(
            list(map(str, command)), env=self.environment | environment, capture_output=True, text=True, timeout=250
        )

    def output(self, *command) -> str:
        """Return the output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def usable_nodes(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-r", "-t", "idle,mix,alloc", "-o", "%N").stdout.split())

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, ExitCode, Restarts, ..."""
        words = self.output("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


class Slowed(threading.Thread):
    """Stops the processes that have `word` in their command line for most of each half second.

    SLURM looks at time limits every 30 seconds. A job that waits for that leaves the cores to other tests.
    """

    def __init__(self, word: str) -> None:
        super().__init__(daemon=True)
        self._word, self._end = word, threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            self._each(psutil.Process.suspend)
            self._end.wait(0.35)
            self._each(psutil.Process.resume)
            self._end.wait(0.15)

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        for process in psutil.process_iter(["cmdline"]):
            program, *words = process.info["cmdline"] or [""]
            if "python" in program and any(self._word in word for word in words):
                with suppress(psutil.NoSuchProcess):  # it has ended
                    act(process)

    def __enter__(self) -> "Slowed":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self.join()
