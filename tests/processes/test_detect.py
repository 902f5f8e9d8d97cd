"""What clusters say of a process, by their variables; JAX's own classes read them."""

from __future__ import annotations

import os
import re
import socket

import jax
import pytest
from jax._src import clusters

from jaxdistill import processes
from jaxdistill.errors import InputError
from jaxdistill.processes.detect import Place, find_place

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
         "SLURM_STEP_NODELIST": "node[01-04,07]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}  # fmt: skip
SLURM_PORT = 65535 - 2**12 + 1 + 4097 % 2**12
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
OF_CLUSTERS = re.compile(r"SLURM_|OMPI_|TPU_|MEGASCALE_|JAX_(COORD|NUM_PROC|PROCESS_|LOCAL)|KUBERNETES_|CUDA_VIS|ROCR_|HIP_|JOB_COMPLETION")


@pytest.fixture
def cluster(monkeypatch):
    """Sets the variables of a cluster; no others are there."""
    for name in [name for name in os.environ if OF_CLUSTERS.match(name)]:
        monkeypatch.delenv(name)

    def become(*variables: dict[str, str]) -> None:
        for each in variables:
            for name, value in each.items():
                monkeypatch.setenv(name, value)

    return become


def place(coordinator=None, processes=None, process=None) -> Place | None:
    return find_place(coordinator, processes, process, timeout=1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[01-04,07]", "node01"), ("node01", "node01"), ("gpu7,node[01-02]", "gpu7"), ("a-b[003,007-015],c", "a-b003")],
)
def test_slurm(cluster, nodes, first):
    cluster(SLURM, {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": nodes})
    assert place() == Place(f"{first}:{SLURM_PORT}", 4, 2, None)


@pytest.mark.parametrize(
    "alone",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # the shell of salloc, itself a step of one task
    ],
)
def test_slurm_with_one_task_is_left_alone(cluster, alone):
    cluster(SLURM, alone)
    assert place() is None


def test_a_batch_script_without_srun_is_one_process(cluster):
    cluster({name: value for name, value in SLURM.items() if "STEP" not in name})
    assert place() is None


@pytest.mark.parametrize(
    ("variables", "local", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 0, None),  # one task a node: all of its GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, 0, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, 3, [3]),  # one each
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1, [2, 3]),  # shared evenly
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_GPUS_ON_NODE": "8"}, 0, None),  # this is the node with one
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, 3, None),  # bound to the task
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, 1, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, 3, [3]),  # nobody says how many there are: as JAX
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, 3, None),  # JAX reads it
    ],
)
def test_every_device_of_a_host_has_an_owner(cluster, variables, local, expected):
    cluster(SLURM, {"SLURM_LOCALID": str(local)}, variables)
    assert place().devices == expected


def test_gpus_that_cannot_be_shared_are_refused(cluster):
    cluster(SLURM, {"SLURM_STEP_TASKS_PER_NODE": "3(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    with pytest.raises(InputError, match="3 processes on one host cannot share its 4 GPUs evenly; start one process on each host"):
        place()


def test_open_mpi(cluster):
    cluster(OPEN_MPI, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert place() == Place(f"10.96.0.1:{1531576320 // 2**12 % 2**12 + 65535 - 2**12 + 1}", 8, 5, [1])
    cluster({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    assert place() is None


def test_open_mpi_5_does_not_say_where_process_0_is(cluster):
    cluster({name: value for name, value in OPEN_MPI.items() if "uri" not in name})
    with pytest.raises(InputError, match="pip install mpi4py, or give --coordinator HOST:PORT"):
        place()
    assert place("10.0.0.1:8476") == Place("10.0.0.1:8476", 8, 5, [1])


def tpu(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    return cloud_tpu_cluster


def test_gke_tpu(cluster, monkeypatch):
    tpu(monkeypatch)
    cluster({"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"})
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        cluster({name: ""})
    assert place() == Place("w-0.svc:8482", 2, 1, None)
    # Two slices of two hosts each.
    cluster({"MEGASCALE_COORDINATOR_ADDRESS": "s0-w0:8081", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"})
    assert place() == Place("s0-w0:8482", 4, 3, None)


def test_gke_tpu_with_one_host_is_left_alone(cluster, monkeypatch):
    tpu(monkeypatch)
    cluster({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "1"})
    assert place() is None


def test_metadata_that_is_not_there_is_said(cluster, monkeypatch):
    def get_metadata(key):
        raise ConnectionError("metadata.google.internal: no such host")

    monkeypatch.setattr(tpu(monkeypatch), "get_metadata", get_metadata)
    with pytest.raises(InputError, match=r"this cluster does not say who takes part: metadata.google.internal: no such host; give --coord"):
        place()
    assert place("h:1", 2, 0) == Place("h:1", 2, 0, None)


@pytest.mark.parametrize(("endpoints", "expected"), [("unknown:0:10.0.0.1,unknown:1:10.0.0.2", 2), ("host-0", None)])
def test_cloud_tpu(cluster, monkeypatch, endpoints, expected):
    metadata = {"agent-worker-number": "0", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'us-central2-b'"}
    monkeypatch.setattr(tpu(monkeypatch), "get_metadata", lambda key: (metadata[key], 200))
    found = place()
    assert found == (expected and Place("10.0.0.1:8482", 2, 0, None))


def test_kubernetes_is_asked_only_by_a_pod_of_several(cluster, monkeypatch):
    asked = []
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", classmethod(lambda cls: bool(asked.append(1))))
    cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert place() is None and not asked
    cluster({"JOB_COMPLETION_INDEX": "0"})
    assert place() is None and asked


def test_flags(cluster):
    cluster()
    assert place() is None
    assert place(processes=1) is None
    assert place("h:1", 1, 0) is None
    assert place("[::1]:8476", 3, 2) == Place("[::1]:8476", 3, 2, None)
    cluster(SLURM)  # goes before what the cluster says, and may be a part of it
    assert place("h:1", 9, 8) == Place("h:1", 9, 8, None)
    assert place("h:1") == Place("h:1", 4, 2, None)
    assert place(processes=3).count == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), r"--processes and --process: missing; without a cluster that JAX recognises"),
        ((None, 4, None), "--coordinator and --process: missing"),
        ((None, 4, 1), "--coordinator: missing"),
        (("h:1", None, 0), "--processes: missing"),
        (("h:1", 4, 4), "--process: 4 is none of 4 processes, which are numbered 0 to 3"),
        (("h:1", 4, -1), "--process: -1 is none of 4 processes"),
        (("h:1", 1, 1), "--process: 1 is none of 1 processes"),
        (("h:1", 0, 0), "--processes: 0; how many are there"),
        (("h", 2, 0), "--coordinator: 'h' is no HOST:PORT"),
        (("h:port", 2, 0), "--coordinator: 'h:port' is no HOST:PORT"),
        ((":70000", 2, 0), "is no HOST:PORT"),
        (("h:70000", 2, 0), "is no HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(cluster, flags, message):
    cluster()
    with pytest.raises(InputError, match=message):
        place(*flags)


def test_join_hands_it_all_to_jax(cluster, monkeypatch):
    given = {}

    def initialize(*arguments, **options):
        given["arguments"], given["options"] = arguments, options
        raise RuntimeError("port in use")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr("jaxdistill.processes.group.instead_of_abort", lambda explain: given.update(explain=explain))
    cluster(SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    with pytest.raises(InputError, match=f"process 2: cannot join at node01:{SLURM_PORT}: port in use"):
        processes.join(heartbeat=30, timeout=7)
    assert given["arguments"] == (f"node01:{SLURM_PORT}", 4, 2, [2, 3])
    assert given["options"] == {
        "cluster_detection_method": "deactivate", "initialization_timeout": 7, "heartbeat_timeout_seconds": 70,
    }  # fmt: skip
    with pytest.raises(InputError, match="at least 1 second"):
        processes.join(heartbeat=0.5)


def test_a_port_that_is_taken(cluster):
    cluster()
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"process 0: cannot listen at {address}: Address already in use"):
            processes.join(address, 2, 0)


def test_one_process_and_one_that_has_joined_already_are_left_alone(cluster, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: pytest.fail("initialised"))
    cluster()
    processes.join()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    cluster(SLURM)
    processes.join()


def test_devices_of_processes_that_have_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"2 processes hold devices, but they have not joined: call jax.distributed.initialize"):
        processes.check_joined()
