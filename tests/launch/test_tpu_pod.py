"""tpu_pod.sh against a stand-in of gcloud: what it asks for, in which order, and what is left."""

from __future__ import annotations

import subprocess

import pytest
from stand_ins import HOSTILE, LAUNCH, Cloud, noted
from waiting import PATIENCE

WAITING = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
ONCE = ["create", "describe", "scp", "ssh", "delete"]


@pytest.fixture
def pod(tmp_path):
    """pod(attempts, arguments) -> (exit code, stderr, cloud); started in a folder with a config whose name has a space."""

    def run(attempts: list[dict], arguments: list[str] = ["my run.yaml"], **changes: str | None):  # noqa: B006
        cloud = Cloud(tmp_path, attempts)
        (tmp_path / "my run.yaml").write_text("teacher: x")
        environment = {name: value for name, value in (cloud.environment | changes).items() if value is not None}
        line = [LAUNCH / "tpu_pod.sh", *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stderr, cloud

    return run


def test_begins_again_when_taken_away(pod, tmp_path):
    """Waits for the TPUs; exit 75 on every host, then done. The hosts' shell gets every argument as it was given."""
    code, error, cloud = pod([{"states": WAITING, "codes": "75"}, {"states": ["ACTIVE"]}], ["my run.yaml", *HOSTILE])
    assert code == 0, error
    assert cloud.calls == ["create", *["describe"] * 3, "scp", "ssh", "describe", "delete", *ONCE] and not cloud.left
    calls = noted(cloud.notes)
    assert len(calls) == 4 and [call["arguments"] for call in calls] == [["distill", "my run.yaml", *HOSTILE]] * 4
    assert {call["cwd"] for call in calls} == {str(tmp_path / f"attempt{i}.host{j}") for i in (0, 1) for j in (0, 1)}
    assert all((tmp_path / "attempt1.host1" / name).exists() for name in ("my run.yaml", "jaxdistill-0.1.0-py3-none-any.whl"))
    assert "mount -t nfs 10.0.0.2:/my runs /runs" in (tmp_path / "attempt0.host0" / "sudo").read_text()
    assert not list(tmp_path.rglob("pwned"))


def test_begins_again_when_hosts_vanish(pod):
    """No exit code came back: the connection is lost and the TPUs are no longer active."""
    code, error, cloud = pod([{"states": ["ACTIVE", "SUSPENDING"], "connection": "lost"}, {"states": ["ACTIVE"]}])
    assert code == 0, error
    assert cloud.calls == ["create", "describe", "scp", "ssh", "describe", "delete", *ONCE] and not cloud.left


def test_begins_again_when_taken_away_before_it_began(pod):
    code, error, cloud = pod([{"states": ["PROVISIONING", "SUSPENDED"]}, {"states": ["ACTIVE"]}])
    assert code == 0, error
    assert cloud.calls == ["create", "describe", "describe", "scp", "describe", "delete", *ONCE] and not cloud.left


@pytest.mark.parametrize("codes, expected", [("2", 2), ("0 1", 1)])
def test_an_error_ends_it(pod, codes, expected):
    code, _, cloud = pod([{"states": ["ACTIVE"], "codes": codes}])
    assert code == expected and cloud.calls == ["create", "describe", "scp", "ssh", "describe", "delete"] and not cloud.left


def test_no_tpus(pod):
    code, error, cloud = pod([{"states": ["WAITING_FOR_RESOURCES", "FAILED"]}])
    assert code == 1 and "no TPUs" in error and cloud.calls[-1] == "delete" and not cloud.left


@pytest.mark.parametrize("failures, expected", [(19, 0), (20, 1)])
def test_gcloud_may_fail_a_while(pod, failures, expected):
    states = ["PROVISIONING", *["UNAVAILABLE"] * 19, "PROVISIONING", *["UNAVAILABLE"] * failures, "ACTIVE"]
    code, error, cloud = pod([{"states": states}])
    assert code == expected and ("failed 20 times" in error) == bool(expected) and cloud.calls[-1] == "delete" and not cloud.left


def test_a_name_that_is_taken_is_left_alone(pod, tmp_path):
    """Run twice: the second must not delete the first one's TPUs."""
    (tmp_path / "resource").write_text("{}")
    code, error, cloud = pod([{"states": ["ACTIVE"]}])
    assert code == 1 and "ALREADY_EXISTS" in error and cloud.calls == ["create"] and cloud.left


@pytest.mark.parametrize(
    "arguments, changes, message",
    [
        ([], {}, "give a config"),
        (["my run.yaml"], {"ZONE": None}, "ZONE: as in us-west4-a"),
        (["my run.yaml"], {"SHARE": ""}, "SHARE: as in"),
        (["other.yaml"], {}, "other.yaml: no such config"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_asked_for(pod, arguments, changes, message):
    code, error, cloud = pod([], arguments, **changes)
    assert code in (1, 2) and message in error and not cloud.calls
