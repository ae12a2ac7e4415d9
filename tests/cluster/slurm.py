"""A SLURM of one node on this machine, in a temporary folder: munged, slurmctld and slurmd are
child processes of this one, and end with it. Needs Debian's packages slurm-wlm and munge, and no
systemd.  usage: python tests/cluster/slurm.py COMMAND..."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CPUS = 4  # that the node claims
REQUEUE_DELAY = 5  # s, from a requeue to the next start
CONFIG = """
ClusterName=asap
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={delay}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9 MaxTime=60
"""


def missing() -> list[str]:
    "Programs that are not installed"
    return [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]


def _path() -> str:  # Debian's daemons are not on the PATH of a user
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        some = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in some:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in some]


def _write_config(folder: Path) -> Path:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    path, host = folder / "slurm.conf", socket.gethostname().partition(".")[0]
    known = dict(folder=folder, host=host, user=getpass.getuser(), ports=_free_ports(2))
    path.write_text(CONFIG.format(**known, cpus=CPUS, delay=REQUEUE_DELAY))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    return path


def _munged(folder: Path) -> list[str]:
    files = dict(key="munge.key", pid="munged.pid", log="munged.log", seed="munge.seed")
    named = [f"--{k}-file={folder / name}" for k, name in files.items()]
    return ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *named]


def _wait_for(ready, folder: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f.read_text()[-2000:] for f in folder.glob("*.out"))
            raise TimeoutError(f"SLURM does not start:\n{logs}")
        time.sleep(0.1)


def _is_idle() -> bool:
    told = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout
    return told.split() == ["idle"]


def _jobs() -> str:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout


def _cancel_jobs(seconds: float = 45) -> None:  # KillWait is 30 s
    subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
    end = time.monotonic() + seconds
    while _jobs() and time.monotonic() < end:
        time.sleep(0.2)


def _kill_steps(config: str) -> None:  # those of a job that did not end in time
    for p in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            env = p.environ()
            of_job = "SLURM_JOB_ID" in env or p.info["name"].startswith("slurmstepd")
            if of_job and env.get("SLURM_CONF") == config:
                p.kill()


def _end(daemons: list[subprocess.Popen]) -> None:
    for one in reversed(daemons):
        one.terminate()
        try:
            one.wait(10)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


@contextlib.contextmanager
def slurm() -> Iterator[Path]:  # its folder
    "Within, `sbatch` and the other commands of SLURM reach a cluster of this machine"
    before, daemons = dict(os.environ), []
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        os.environ.update(SLURM_CONF=str(_write_config(folder)), PATH=_path())

        def start(*words: str) -> None:
            with open(folder / f"{words[0]}.out", "w") as log:
                daemons.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))

        try:
            start(*_munged(folder))
            _wait_for((folder / "munge.socket").exists, folder)
            start("slurmctld", "-D", "-i")
            start("slurmd", "-D")
            _wait_for(_is_idle, folder)
            yield folder
        finally:
            _cancel_jobs()
            _end(daemons)
            _kill_steps(os.environ["SLURM_CONF"])
            os.environ.clear()
            os.environ.update(before)


if __name__ == "__main__":
    if missing():
        sys.exit(f"not installed: {', '.join(missing())} (apt-get install slurm-wlm munge)")
    with slurm():
        sys.exit(subprocess.run(sys.argv[1:]).returncode)
