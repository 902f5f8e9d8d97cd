"""Stand-ins of gcloud, SLURM and what a fresh host has, as commands of a folder to put in front of PATH.

They are strict: an option, a state or an order of things that the real one would refuse is refused. What `jaxdistill` is called with
is noted by a stand-in of it, which ends with the code that it is told.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import textwrap
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
LAST_LINE = 'jaxdistill distill "$@"'

# Arguments that a shell would take apart or carry out.
HOSTILE = ["students.a.initialise=[1,2]", 'data.sources=["a b/*.jsonl", "it\'s"]', "x=$(touch pwned)", "`id`", ";exit 3", "two\nlines"]
HOSTILE += ["", "*", "a  b "]

# Notes its arguments, environment and number; with LINGER it waits for SIGTERM, as in training, and then ends with 75.
JAXDISTILL = """
import json, os, pathlib, signal, sys, time
notes = pathlib.Path(os.environ["NOTES"])
note = {"arguments": sys.argv[1:], "pid": os.getpid(), "cwd": os.getcwd(), "environment": dict(os.environ)}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(notes / f".{os.getpid()}").write_text(json.dumps(note))
(notes / f".{os.getpid()}").rename(notes / f"{time.time_ns()}.{os.getpid()}.json")
if "LINGER" in os.environ:
    time.sleep(600)
codes = [int(code) for code in os.environ.get("CODES", "0").split()]
sys.exit(codes[int(os.environ.get("SLURM_PROCID", os.environ.get("TPU_WORKER_ID", 0))) % len(codes)])
"""


def write_command(folder: Path, name: str, source: str) -> None:
    """An executable Python script; without site-packages, so that it starts in 20 ms."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable} -SE\n{textwrap.dedent(source)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(commands: Path, notes: Path, **more: str) -> dict[str, str]:
    """Nothing of the caller's, and of the system only /usr/bin and /bin behind the stand-ins."""
    notes.mkdir(exist_ok=True)
    return {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(notes.parent), "NOTES": str(notes)} | more


def noted(notes: Path) -> list[dict]:
    """What the stand-in of jaxdistill was called with, in the order of time."""
    return [json.loads(path.read_text()) for path in sorted(notes.glob("*.json"))]


# --- Google Cloud ---

# The options of Cloud SDK 528 that the script may use. A resource exists from create to delete; hosts are folders.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
attempts = json.loads((cloud / "attempts.json").read_text())
resource, made = cloud / "resource", cloud / "made"
with (cloud / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
words = [word for word in sys.argv[1:] if not word.startswith("--")]
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
known = {
    "queued-resources create": {"node-id", "accelerator-type", "runtime-version", "spot"},
    "queued-resources describe": {"format"},
    "queued-resources delete": {"force"},
    "tpu-vm scp": {"worker"},
    "tpu-vm ssh": {"worker", "command"},
}
verb = " ".join(words[2:4])
unknown = set(options) - known.get(verb, set()) - {"zone", "project", "quiet"}
if words[:2] != ["compute", "tpus"] or verb not in known or unknown or "zone" not in options:
    sys.exit(f"gcloud: unknown: {sys.argv[1:]}")
if verb == "queued-resources create":
    if resource.exists():
        sys.exit("ALREADY_EXISTS: " + words[4])
    assert {"node-id", "accelerator-type", "runtime-version"} <= set(options)
    number = int(made.read_text()) if made.exists() else 0
    made.write_text(str(number + 1))
    resource.write_text(json.dumps({"name": words[4], "attempt": number, "looks": 0}))
    sys.exit()
if not resource.exists():
    sys.exit("NOT_FOUND")
there = json.loads(resource.read_text())
attempt = attempts[there["attempt"]]
name = words[-1].partition(":")[0] if verb == "tpu-vm scp" else words[4]
if name != there["name"]:
    sys.exit("NOT_FOUND: " + name)
hosts = [cloud / f"attempt{there['attempt']}.host{i}" for i in range(2)]
state = attempt["states"][min(there["looks"], len(attempt["states"]) - 1)]
if verb == "queued-resources describe":
    assert options["format"] == "value(state.state)"
    resource.write_text(json.dumps(there | {"looks": there["looks"] + 1}))
    sys.exit("UNAVAILABLE") if state == "UNAVAILABLE" else print(state)
elif verb == "queued-resources delete":
    assert "force" in options and "quiet" in options  # else it asks, and refuses one that has TPUs
    resource.unlink()
elif state == "SUSPENDED":
    sys.exit("no VM is there")
elif verb == "tpu-vm scp":
    assert options["worker"] == "all"
    for host in hosts:
        host.mkdir()
        for source in words[4:-1]:
            shutil.copy(source, host)
else:
    assert options["worker"] == "all"
    if attempt.get("connection") == "lost":
        sys.exit(255)
    codes = []
    for number, host in enumerate(hosts):  # ssh: the line goes to the host's shell, in its home
        own = {"HOME": str(host), "PATH": os.environ["HOST_PATH"], "NOTES": os.environ["NOTES"], "TPU_WORKER_ID": str(number)}
        own["CODES"] = attempt.get("codes", "0")
        codes.append(subprocess.run(["bash", "-c", " ".join(options["command"].split(" "))], cwd=host, env=own).returncode)
    sys.exit(next((code for code in codes if code), 0))
"""

# Of the machine that starts it and of the hosts: pip makes the wheel here; there uv makes jaxdistill of it, in ~/.local/bin.
PYTHON3 = """
import os, pathlib, shutil, sys
line = sys.argv[1:]
if line[:3] == ["-m", "pip", "wheel"]:
    root = pathlib.Path(line[-1])
    assert (root / "pyproject.toml").is_file(), root
    (pathlib.Path(line[line.index("--wheel-dir") + 1]) / "jaxdistill-0.1.0-py3-none-any.whl").write_text("wheel")
elif line[:3] == ["-m", "pip", "install"]:
    assert line[-1] == "uv"
elif line[:4] == ["-m", "uv", "tool", "install"]:
    assert pathlib.Path(line[-1]).read_text() == "wheel" and "jax[tpu]" in line, line
    folder = pathlib.Path.home() / ".local" / "bin"
    folder.mkdir(parents=True)
    shutil.copy(os.environ["PATH"].split(":")[0] + "/hidden/jaxdistill", folder)
else:
    sys.exit(f"python3: {line}")
"""


class Cloud:
    """Google Cloud with a plan of what becomes of each pod that is asked for, and a machine to start from."""

    def __init__(self, folder: Path, attempts: list[dict]):
        self.folder, self.notes = folder, folder / "notes"
        (folder / "attempts.json").write_text(json.dumps(attempts))
        here, host = folder / "here", folder / "host"
        for commands in (here, host):
            write_command(commands, "python3", PYTHON3)
        write_command(here, "gcloud", GCLOUD)
        write_command(host / "hidden", "jaxdistill", JAXDISTILL)
        write_command(host, "mountpoint", "import sys; sys.exit(32)")
        write_command(
            host,
            "sudo",
            """
            import os, pathlib, sys
            with (pathlib.Path.home() / "sudo").open("a") as done:
                done.write(" ".join(sys.argv[1:]) + "\\n")
            """,
        )
        more = {"CLOUD": str(folder), "HOST_PATH": f"{host}:/usr/bin:/bin", "POLL_SECONDS": "0"}
        self.environment = environment(here, self.notes, ZONE="us-west4-a", TYPE="v5litepod-16", SHARE="10.0.0.2:/my runs", **more)

    @property
    def calls(self) -> list[str]:
        """What gcloud did, without options: create, describe, ..."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line)[3] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def left(self) -> bool:
        """Whether TPUs are still paid for."""
        return (self.folder / "resource").exists()


# --- SLURM ---

# Options of srun(1) that the batch script may use. Tasks are local processes with the variables that srun sets for each.
SRUN = """
import os, re, subprocess, sys
line = sys.argv[1:]
while line and line[0].startswith("-"):
    option = line.pop(0)
    if not re.fullmatch(r"--(kill-on-bad-exit=[01]|wait=[0-9]+)", option):
        sys.exit(f"srun: unrecognized option '{option}'")
job = os.environ
tasks = int(job["SLURM_NTASKS"])
step = {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NPROCS": str(tasks)}
step |= {"SLURM_STEP_NODELIST": job["SLURM_JOB_NODELIST"], "SLURM_STEP_NUM_NODES": job["SLURM_NNODES"]}
step |= {"SLURM_STEP_TASKS_PER_NODE": job["SLURM_TASKS_PER_NODE"]}
if "SRUN_CPUS_PER_TASK" in job:
    step["SLURM_CPUS_PER_TASK"] = job["SRUN_CPUS_PER_TASK"]
else:
    job.pop("SLURM_CPUS_PER_TASK", None)
running = []
for task in range(tasks):
    own = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0", "SLURMD_NODENAME": f"node{task + 1}"}
    running.append(subprocess.Popen(line, env=job | step | own))
codes = [process.wait() for process in running]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """
import os, pathlib, sys
assert sys.argv[1] == "requeue" and sys.argv[2] == os.environ["SLURM_JOB_ID"], sys.argv
(pathlib.Path(os.environ["NOTES"]) / "requeued").write_text("")
"""

# Long options of sbatch(1); what follows = is checked where it has a form.
SBATCH_OPTIONS = {
    "job-name": r"\S+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "gpus-per-node": r"(\w+:)?\d+", "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+(:\d+){0,2}", "signal": r"([BR]+:)?\w+(@\d+)?", "requeue": "", "open-mode": "append|truncate", "partition": r"\S+",
    "account": r"\S+", "output": r"\S+", "exclusive": "",
}  # fmt: skip


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them: up to the first command."""
    found = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif line.strip() and not line.startswith("#"):
            break
    return found


def batch_environment(folder: Path, *, nodes: int, node_list: str, job_id: int = 4711, **more: str) -> dict[str, str]:
    """What sbatch gives its script on the first node; `folder` gets the stand-ins."""
    commands = folder / "commands"
    write_command(commands, "srun", SRUN)
    write_command(commands, "scontrol", SCONTROL)
    said = directives(LAUNCH / "slurm.sbatch")
    tasks = nodes * int(said["ntasks-per-node"])
    job = {
        "SLURM_JOB_ID": job_id, "SLURM_JOBID": job_id, "SLURM_JOB_NAME": said["job-name"], "SLURM_JOB_NODELIST": node_list,
        "SLURM_NODELIST": node_list, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes, "SLURM_NTASKS": tasks,
        "SLURM_NTASKS_PER_NODE": said["ntasks-per-node"], "SLURM_TASKS_PER_NODE": f"1(x{nodes})" if nodes > 1 else "1",
        "SLURM_CPUS_PER_TASK": said["cpus-per-task"], "SLURM_GPUS_PER_NODE": said["gpus-per-node"], "SLURM_PROCID": 0, "SLURM_LOCALID": 0,
        "SLURM_NODEID": 0, "SLURM_SUBMIT_DIR": folder,
    }  # fmt: skip
    return environment(commands, folder / "notes") | {name: str(value) for name, value in job.items()} | more


def spooled(folder: Path) -> list[str]:
    """The script as a node runs it: a copy in a folder of the daemon's."""
    copy = folder / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    copy.chmod(0o700)
    assert os.access(copy, os.X_OK)
    return [str(copy)]
