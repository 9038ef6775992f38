"""A real Slurm cluster on this machine, for as long as a test session.

munged, slurmctld and one slurmd a node, from Debian's packages, all private to one folder, on the loopback. Each slurmd
has its own host name and pid namespace where the kernel lets us, so that a node behaves like a machine of its own; they
share the network and the files. Several clusters can run at once. The kernel ends the daemons when the process that
started them dies, in whatever way.

    apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client      (as root)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sorahpc.lease import start_time

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
INSTALL = "apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client"
HOSTS = Path("/etc/hosts")
SBIN = "/usr/sbin:/sbin"
REQUEUE_DELAY_S = 6  # cred_expire + 1

CONF = """\
ClusterName=mini
FirstJobId={first_id}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire + 1 s; the default of 120 is too long for a test, less than 5 is refused.
AuthInfo=socket={d}/run/munge.sock,cred_expire=5
{listen}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/%n.log
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Believe the CPUs and memory below, not the hardware.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={mem_per_cpu}
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=30
KillWait=3
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """No Slurm can run here; the text says why and what to do."""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    missing = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found): {INSTALL}"
    if os.getuid() != 0:
        return "Slurm's daemons are started as root here, and this is not root"
    return None


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel hands out to others."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(30_100, 32_700), 2_000):
            s = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                s.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise Unavailable("no free ports between 30100 and 32700")


class MiniSlurm:
    """Start with ``start()``, end with ``stop()``; ``env`` is what clients need.

    Args:
        folder: everything of the cluster lies here.
        num_nodes, cpus, mem_mb: nodes, and what each claims to have.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cpus: int = 2, mem_mb: int = 4096):
        self.folder = folder
        self.cpus, self.mem_mb = cpus, mem_mb
        self.ports = _free_ports(num_nodes + 1)
        self.nodes = [f"n{self.ports[0]}x{i}" for i in range(num_nodes)]
        self.tag = f"# sorahpc mini slurm {os.getpid()} {start_time(os.getpid())} {folder}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def start(self) -> None:
        """Raises Unavailable with the reason when it doesn't come up."""
        try:
            self._configure()
            self._daemon(
                "munged",
                "munged",
                "--foreground",
                f"--key-file={self.folder}/etc/munge.key",
                f"--socket={self.folder}/run/munge.sock",
                f"--pid-file={self.folder}/run/munged.pid",
                f"--log-file={self.folder}/log/munged.log",
                f"--seed-file={self.folder}/run/munged.seed",
                "--num-threads=2",
            )
            self._until("munged", 20, lambda: self._ok("munge", "-S", f"{self.folder}/run/munge.sock", "-n"))
            self._daemon("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self._until("all nodes", 60, self._all_idle)
        except BaseException:
            self.stop()
            raise

    def start_node(self, node: str) -> None:
        if self.namespaces:
            inside = f"hostname {node}; slurmd -D -N {node} & wait $!"  # bash, as pid 1, reaps what jobs leave
            self._daemon(
                node, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", inside
            )
        else:
            self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut: slurmd and all its job's processes at once."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        if not getattr(self, "namespaces", True) and "slurmctld" in self.daemons:
            self.run("scancel", "--user=root")  # jobs outlive a slurmd that has no namespace to die with it
            with contextlib.suppress(Unavailable):
                self._until("jobs to end", 15, lambda: not self.run("squeue", "--noheader").stdout.strip())
        for name, daemon in reversed(self.daemons.items()):
            if name in self.nodes and self.namespaces:
                daemon.kill()
            else:
                daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = {}
        self._write_hosts(None)

    def run(self, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """A Slurm client command."""
        return subprocess.run(command, env=self._environ(), capture_output=True, text=True, timeout=timeout)

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, ExitCode, ..."""
        done = self.run("scontrol", "show", "job", "--oneliner", job_id)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Until a job (all tasks of an array) is in one of `states`, by default any in which it has ended.

        Returns:
            ``job(job_id)`` of the first task. Raises AssertionError with its last words after `timeout` seconds.
        """
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        deadline = time.monotonic() + timeout
        while True:
            done = self.run("scontrol", "show", "job", "--oneliner", job_id)
            lines = [line for line in done.stdout.splitlines() if line.startswith("JobId=")]
            now = [line.split("JobState=")[1].split()[0] for line in lines]
            if now and all(state in wanted for state in now):
                return self.job(job_id)
            assert time.monotonic() < deadline, f"job {job_id}: {now} after {timeout} s, not {wanted}\n{done.stdout}"
            time.sleep(0.2)

    def _environ(self) -> dict[str, str]:
        return {**os.environ, **self.env, "PATH": f"{os.environ.get('PATH', '')}:{SBIN}"}

    def _ok(self, *command: str) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.run(*command, timeout=5).returncode == 0
        return False

    def _all_idle(self) -> bool:
        done = self.run("sinfo", "--noheader", "--Node", "--format=%T")
        return done.stdout.split() == ["idle"] * len(self.nodes)

    def _until(self, what: str, seconds: float, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    said = (self.folder / "log" / f"{name}.out").read_text(errors="replace").strip().splitlines()[-3:]
                    raise Unavailable(f"{name} ended with {daemon.returncode}: {' / '.join(said)}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{what}: not ready after {seconds} s; logs in {self.folder / 'log'}")
            time.sleep(0.1)

    def _daemon(self, name: str, *command: str) -> None:
        # A clean environment: what the tests set must reach jobs through sbatch, not through slurmd.
        env = {"PATH": f"/usr/local/bin:/usr/bin:/bin:{SBIN}", "LANG": "C.UTF-8", **self.env}
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _configure(self) -> None:
        d = self.folder
        for sub in ("etc", "run", "log", "state", *(f"spool/{n}" for n in self.nodes)):
            (d / sub).mkdir(parents=True, exist_ok=True)
        for folder in (d, d / "run"):
            folder.chmod(0o755)  # munged insists that the way to its socket is open to all
        key = d / "etc" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        # slurmd looks for cgroups even where it uses none, and ends where it finds nothing mounted.
        (d / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        probe = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"]
        self.namespaces = subprocess.run(probe, capture_output=True).returncode == 0
        host = socket.gethostname().split(".")[0]
        self._write_hosts(" ".join(self.nodes))
        try:
            address = socket.gethostbyname(host)
        except OSError:
            self._write_hosts(" ".join([host, *self.nodes]))
            address = "127.0.0.1"
        listen = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if address.startswith("127.") else ""
        nodes = "\n".join(
            f"NodeName={n} NodeHostname={n} NodeAddr=127.0.0.1 Port={p} CPUs={self.cpus} RealMemory={self.mem_mb}"
            for n, p in zip(self.nodes, self.ports[1:], strict=True)
        )
        text = CONF.format(
            d=d,
            host=host,
            port=self.ports[0],
            listen=listen,
            nodes=nodes,
            mem_per_cpu=self.mem_mb // self.cpus,
            # Ids of different clusters differ: what a test left in a folder is never taken for another's.
            first_id=int(time.time()) % 1_000_000 * 10 + 1,
        )
        (d / "etc" / "slurm.conf").write_text(text)

    def _write_hosts(self, names: str | None) -> None:
        """Put the nodes into /etc/hosts (MASTER_ADDR must resolve), or take them out; drop those of dead sessions."""
        with _locked(HOSTS):
            kept = [line for line in HOSTS.read_text().splitlines() if not self._stale(line)]
            if names is not None:
                kept.append(f"127.0.0.1 {names} {self.tag}")
            HOSTS.write_text("\n".join(kept) + "\n")  # in place: it may be a bind mount

    def _stale(self, line: str) -> bool:
        mark, _, rest = line.partition("# sorahpc mini slurm ")
        if not mark or not rest:
            return False
        pid, started = rest.split()[:2]
        return line.endswith(self.tag) or str(start_time(int(pid))) != started


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
