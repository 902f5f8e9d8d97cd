"""What all files of launch/ have in common, and what holds of each as a text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import pytest
import yaml
from stand_ins import LAST_LINE, LAUNCH, SBATCH_OPTIONS, directives

MANIFEST = LAUNCH / "gke_jobset.yaml"
SCHEMA = Path(__file__).with_name("jobset.schema.json")


def test_all_end_in_the_same_command():
    texts = {path.name: path.read_text() for path in LAUNCH.iterdir()}
    texts["colab.ipynb"] = nbformat.reads(texts["colab.ipynb"], as_version=4).cells[-1].source
    assert set(texts) == {"tpu_pod.sh", "slurm.sbatch", "gke_jobset.yaml", "colab.ipynb"}
    assert {text.rstrip("\n").splitlines()[-1].strip() for text in texts.values()} == {LAST_LINE}
    # What the file says is what is run: the manifest's line is the shell's last one.
    assert container()["command"][-1].rstrip("\n").endswith(f"\n{LAST_LINE}")


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch"])
def test_shell_files_are_clean_and_short(name):
    path = LAUNCH / name
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = path.read_text().splitlines()
    assert len(lines) <= 60 and "set -euo pipefail" in lines and max(map(len, lines)) <= 140


def test_sbatch_directives_are_known():
    found = directives(LAUNCH / "slurm.sbatch")
    assert len(found) == (LAUNCH / "slurm.sbatch").read_text().count("\n#SBATCH")  # none comes too late to be read
    for name, value in found.items():
        assert name in SBATCH_OPTIONS and re.fullmatch(SBATCH_OPTIONS[name], value), (name, value)


def container() -> dict:
    pod = yaml.safe_load(MANIFEST.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_manifest_fits_the_schema():
    validator().validate(yaml.safe_load(MANIFEST.read_text()))


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("maxRestarts: 3", "maxRestart: 3"),
        ("maxRestarts: 3", "maxRestarts: three"),
        ("action: RestartJobSetAndIgnoreMaxRestarts", "action: Restart"),
        ("backoffLimit: 0", "backofflimit: 0"),
        ('status: "True"', "status: True"),
        ('gke-spot: "true"', "gke-spot: true"),
        ("values: [75]", 'values: ["75"]'),
        ("mountPath:", "mountpath:"),
        ("nfs: {server: 10.0.0.2, ", "nfs: {"),
        ("containers:", "container:"),
        ("args: [", "args: [1, "),
        ("v1alpha2", "v1alpha1"),
    ],
)
def test_a_wrong_field_is_refused(right, wrong):
    text = MANIFEST.read_text()
    assert text.count(right) == 1
    assert list(validator().iter_errors(yaml.safe_load(text.replace(right, wrong))))


def test_manifest_agrees_with_itself():
    """What the schema cannot say."""
    job = yaml.safe_load(MANIFEST.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod, own = job["template"]["spec"], container()
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // own["resources"]["limits"]["google.com/tpu"]
    assert pod["restartPolicy"] == "Never"  # else Kubernetes refuses a podFailurePolicy
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == own["name"]
    assert {mount["name"] for mount in own["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounted = own["volumeMounts"][0]["mountPath"]
    assert own["args"][1].startswith(f"{mounted}/") and own["args"][2].startswith(f"output={mounted}/")
    assert not re.search(r"\$\(", own["command"][-1])  # Kubernetes would replace it
