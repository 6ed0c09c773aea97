"""A real Slurm on this machine for tests: munged, slurmctld and one slurmd per node, each host in namespaces of its own.

A host is a `sleep` that holds a UTS, a mount and a network namespace: it has its own name, /etc/hosts and network card on
a bridge with no way out. Needs root, Debian's slurm-wlm and munge, iproute2. Everything is ended by the pids recorded
here, and by namespace: nothing else on the machine can be hit.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel", "sacct", "sacctmgr")
SUBNET = "127.0.78"
_SYSTEM_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CONFIG = """
ClusterName=test
SlurmctldHost=login({subnet}.254)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/spool/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
TopologyPlugin=topology/tree
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
MessageTimeout=10
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes={all} Default=YES MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=urgent Nodes={all} MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=closed Nodes={all} State=DOWN
"""


def why_not() -> str:
    """Why no cluster can be started here; empty when it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    if os.getuid() != 0:
        return "starting a Slurm cluster in namespaces needs root"
    if subprocess.run(["unshare", "--uts", "--mount", "--net", "true"], capture_output=True).returncode:
        return "this machine does not let namespaces be made"
    return ""


def _start_time(pid: int) -> int | None:
    """Guards against a pid that was given to another process; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _free_ports(count: int) -> list[int]:
    """Below the range that the kernel gives to clients."""
    found: list[int] = []
    first = 21000 + os.getpid() * 37 % 8000
    for port in range(first, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


class SlurmCluster:
    """``nodes`` nodes called node1, node2, ...; odd ones under switch s1, even ones under s2."""

    def __init__(self, root: Path, nodes: int = 4, cpus: int = 8) -> None:
        self.root, self.cpus = root, cpus
        self.hosts = [f"node{i}" for i in range(1, nodes + 1)]
        self._processes: dict[str, tuple[subprocess.Popen[bytes], int | None]] = {}
        self._namespaces: set[str] = set()

    # ------------------------------------------------------------------ processes

    def environment(self) -> dict[str, str]:
        """For commands of a test: Slurm's commands, run on the login host, come first on PATH."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SQUEUE"))}
        return clean | {
            "SLURM_CONF": str(self.root / "etc/slurm.conf"),
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
        }

    def _start(self, name: str, command: list[str]) -> None:
        environment = self.environment() | {"PATH": _SYSTEM_PATH}
        with (self.root / f"log/{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        self._processes[name] = (process, _start_time(process.pid))

    def _enter(self, host: str, *command: str) -> list[str]:
        pid = self._processes[f"host-{host}"][0].pid
        return ["nsenter", "-t", str(pid), "-u", "-m", "-n", "--wd=/", "--", *command]

    def on(self, host: str, *command: str) -> str:
        """Run a command on a host; its stdout. Raises CalledProcessError."""
        done = subprocess.run(
            self._enter(host, *command), capture_output=True, text=True, timeout=60, env=self.environment()
        )
        if done.returncode:
            raise RuntimeError(f"{command} on {host}: {done.stderr or done.stdout}")
        return done.stdout

    def _kill(self, name: str, number: int) -> None:
        process, started = self._processes.pop(name, (None, None))
        if process is not None:
            if _start_time(process.pid) == started and started is not None:
                process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            if process.poll() is None:
                process.kill()
                process.wait()

    def members(self, host: str) -> Iterator[int]:
        """Pids of everything that lives on a host, but for what holds its namespaces."""
        holder = self._processes[f"host-{host}"][0].pid
        space = os.readlink(f"/proc/{holder}/ns/uts")
        yield from (pid for pid in self._in_spaces({space}) if pid != holder)

    @staticmethod
    def _in_spaces(spaces: set[str]) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/uts") in spaces and _start_time(int(entry.name)) is not None:
                        yield int(entry.name)

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        for name in ("etc", "log", "run", "spool/ctld", "bin", *(f"spool/{host}" for host in self.hosts)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / name).chmod(0o755)
        self._configure()
        try:
            for index, host in enumerate(["login", *self.hosts]):
                self._start_host(host, index)
            self._commands()
            self._start_munge()
            self.start_controller()
            for host in self.hosts:
                self.start_slurmd(host)
            self.wait_for(lambda: all(self.node_state(host) == "idle" for host in self.hosts), "nodes to be idle")
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        controller, slurmd = _free_ports(2)
        addresses = {host: f"{SUBNET}.{i}" for i, host in enumerate(self.hosts, 1)}
        nodes = "\n".join(
            f"NodeName={host} NodeAddr={address} Port={slurmd} CPUs={self.cpus} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=32000"
            for host, address in addresses.items()
        )
        etc = self.root / "etc"
        text = CONFIG.format(subnet=SUBNET, ctld=controller, root=self.root, nodes=nodes, all=",".join(self.hosts))
        (etc / "slurm.conf").write_text(text)
        switches = {"s1": self.hosts[0::2], "s2": self.hosts[1::2]}
        lines = [f"SwitchName={name} Nodes={','.join(hosts)}" for name, hosts in switches.items() if hosts]
        (etc / "topology.conf").write_text("\n".join([*lines, "SwitchName=top Switches=s1,s2", ""]))
        known = {"login": f"{SUBNET}.254", **addresses}
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {h}\n" for h, a in known.items()))
        key = etc / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _start_host(self, host: str, index: int) -> None:
        ready = self.root / f"run/{host}.ready"
        script = (
            f"hostname {host}; mount --bind '{self.root}/etc/hosts' /etc/hosts; touch '{ready}'; exec sleep infinity"
        )
        spaces = ["unshare", "--uts", "--mount", "--net", "--propagation", "private"]
        self._start(f"host-{host}", [*spaces, "sh", "-ec", script])
        self.wait_for(ready.exists, f"host {host}")
        pid = self._processes[f"host-{host}"][0].pid
        self._namespaces.add(os.readlink(f"/proc/{pid}/ns/uts"))
        # All of 127.0.0.0/8 is the loopback's by default: leave it 127.0.0.1, the rest is the cluster's network.
        network = (
            "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip link set lo up; ip addr del 127.0.0.1/8 dev lo; "
            "ip addr add 127.0.0.1/32 dev lo; "
        )
        if host == "login":
            network += (
                f"ip link add br0 type bridge forward_delay 0; ip addr add {SUBNET}.254/24 dev br0; ip link set br0 up"
            )
        else:
            cable = f"ip link add v{index} type veth peer name eth0 netns {pid}; ip link set v{index} master br0 up"
            self.on("login", "sh", "-ec", cable)
            network += f"ip addr add {SUBNET}.{index}/24 dev eth0; ip link set eth0 up"
        self.on(host, "sh", "-ec", network)

    def _commands(self) -> None:
        """Slurm's commands for this machine: the same, on the login host, in the folder they are called from."""
        pid = self._processes["host-login"][0].pid
        for name in COMMANDS:
            path = self.root / "bin" / name
            enter = f'nsenter -t {pid} -u -m -n "--wd=$PWD" -- /usr/bin/{name} "$@"'
            path.write_text(f"#!/bin/sh\nexport SLURM_CONF='{self.root}/etc/slurm.conf'\nexec {enter}\n")
            path.chmod(0o755)

    def _start_munge(self) -> None:
        run, socket_path = self.root / "run", self.root / "run/munge.sock"
        files = [
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munge.seed",
            f"--log-file={self.root}/log/munged.log",
        ]
        munged = [
            "munged",
            "--foreground",
            "--force",
            f"--socket={socket_path}",
            f"--key-file={self.root}/etc/munge.key",
        ]
        self._start("munged", self._enter("login", *munged, *files))

        def answers() -> bool:
            return subprocess.run(["munge", "-n", "-S", str(socket_path)], capture_output=True).returncode == 0

        self.wait_for(answers, "munge")

    def start_controller(self) -> None:
        self._start("slurmctld", self._enter("login", "slurmctld", "-D", "-f", str(self.root / "etc/slurm.conf")))
        self.wait_for(lambda: "UP" in self.ask("scontrol", "ping"), "slurmctld to answer")

    def stop_controller(self) -> None:
        self._kill("slurmctld", signal.SIGKILL)

    def start_slurmd(self, host: str) -> None:
        command = ["slurmd", "-D", "-N", host, "-f", str(self.root / "etc/slurm.conf")]
        self._start(f"slurmd-{host}", self._enter(host, *command))

    def stop_slurmd(self, host: str) -> None:
        self._kill(f"slurmd-{host}", signal.SIGKILL)

    def power_off(self, host: str) -> None:
        """Everything on the host ends at once, as without power."""
        self.stop_slurmd(host)
        for pid in list(self.members(host)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        for name in [n for n in self._processes if not n.startswith("host-")]:
            self._kill(name, signal.SIGKILL)
        end = time.monotonic() + 10
        while time.monotonic() < end and (left := list(self._in_spaces(self._namespaces))):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for name in list(self._processes):
            self._kill(name, signal.SIGKILL)

    def slow_down(self, host: str, rate: str = "20mbit") -> None:
        """Let everything that the host sends pass at this rate only."""
        self.on(
            host,
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "32kbit",
            "latency",
            "400ms",
        )

    def speed_up(self, host: str) -> None:
        self.on(host, "tc", "qdisc", "del", "dev", "eth0", "root")

    # ------------------------------------------------------------------ asking

    def ask(self, *command: str) -> str:
        """stdout of a Slurm command, whatever its exit code."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment())
        return done.stdout

    def node_state(self, host: str) -> str:
        return (self.ask("sinfo", "-h", "-N", "-n", host, "-p", "main", "-o", "%T").split() or ["?"])[0]

    def job(self, job_id: str) -> dict[str, str]:
        text = self.ask("scontrol", "show", "job", "-o", job_id)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for(self, condition: "object", what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end:
                logs = [f"--- {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-12:])
                        for p in sorted((self.root / "log").glob("*"))]  # fmt: skip
                raise AssertionError(f"waited {seconds:g} s for {what}\n" + "\n".join(logs))
            time.sleep(0.1)

    def clear(self) -> None:
        """No jobs, all nodes up: for the next test."""
        self.ask("sh", "-c", "squeue -h -o %A | sort -u | xargs -r scancel")
        self.wait_for(lambda: not self.ask("squeue", "-h").strip(), "the queue to be empty", 90)
        for host in self.hosts:
            if self._processes.get(f"slurmd-{host}") is None:
                self.start_slurmd(host)
        for host in self.hosts:
            if self.node_state(host).startswith(("down", "drain")):
                self.ask("scontrol", "update", f"NodeName={host}", "State=RESUME")
        self.wait_for(lambda: all(self.node_state(h) == "idle" for h in self.hosts), "nodes to be idle", 90)
