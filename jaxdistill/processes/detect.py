"""Where this process stands among others: what JAX recognises (Cloud TPU, GKE, SLURM, Open MPI, Kubernetes), or what the user says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from jaxdistill.errors import InputError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_FLAGS = ("--coordinator", "--processes", "--process")


@dataclass(frozen=True)
class Place:
    """One of several processes. `devices`: numbers of the GPUs that are its own; None: all that it sees."""

    coordinator: str
    count: int
    number: int
    devices: list[int] | None = None


def find_place(coordinator: str | None, processes: int | None, process: int | None, *, timeout: float) -> Place | None:
    """This process's place by the flags (`None`: not given) and the cluster; None where it is alone.

    Raises:
      InputError: flags that contradict each other, or half of them where no cluster says the rest.
    """
    given = (coordinator, processes, process)
    if coordinator is not None:
        _check_address(coordinator)
    if processes is not None and processes < 1:
        raise InputError(f"--processes: {processes}; how many are there, this one with them?")
    cluster = None
    if None in given:
        try:
            cluster = _cluster(needs_address=coordinator is None)
            if cluster is not None:
                processes = _num_tasks(cluster) if processes is None else processes
                if given == (None, None, None) and processes == 1:
                    return None
                process = cluster.get_process_id() if process is None else process
        except (OSError, ImportError, RuntimeError) as error:
            raise InputError(f"this cluster does not say who takes part: {error}; give {', '.join(_FLAGS)}") from None
    if process is not None and processes is not None and not 0 <= process < processes:
        raise InputError(f"--process: {process} is none of {processes} processes, which are numbered 0 to {processes - 1}")
    if processes == 1 or (given == (None, None, None) and cluster is None):
        return None
    if cluster is not None and coordinator is None:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        try:
            coordinator = cluster.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"this cluster does not say where process 0 is: {error}; give --coordinator HOST:PORT") from None
    if missing := [flag for flag, value in zip(_FLAGS, (coordinator, processes, process), strict=True) if value is None]:
        raise InputError(
            f"{' and '.join(missing)}: missing; without a cluster that JAX recognises, several processes need "
            f"--coordinator HOST:PORT (of process 0), --processes N and --process I, one is started without all three"
        )
    return Place(coordinator, processes, process, None if cluster is None else own_devices(cluster))


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator: {address!r} is no HOST:PORT, as in 10.0.0.1:8476")


class _OpenMpi5:
    """What its launcher says: all but where process 0 is. A later JAX asks mpi4py for the rest too."""

    name = "ompi"
    get_process_count = staticmethod(lambda: int(os.environ["OMPI_COMM_WORLD_SIZE"]))
    get_process_id = staticmethod(lambda: int(os.environ["OMPI_COMM_WORLD_RANK"]))
    get_local_process_id = staticmethod(lambda: int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]))


def _cluster(*, needs_address: bool) -> Any:
    """JAX's description of the cluster that this process is in; None for none, or an interactive shell that runs outside of the tasks."""
    from jax._src.clusters import ClusterEnv

    by_name = {each.__name__: each for each in ClusterEnv._cluster_types}
    ours = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    if ours and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        if needs_address and not by_name["Mpi4pyCluster"].is_env_present():
            raise InputError("Open MPI 5 started several processes: pip install mpi4py, or give --coordinator HOST:PORT")
        return by_name["Mpi4pyCluster"] if needs_address else _OpenMpi5
    for each in ClusterEnv._cluster_types:
        # Any pod has the variables of Kubernetes; one of several has its number.
        if each.opt_in_only_method or (each.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        if each.__name__ == "GkeTpuCluster" and _is_one_tpu_host():
            return None
        if each.is_env_present():
            return each
    return None


def _is_one_tpu_host() -> bool:
    """Whether the variables alone say so (Colab, one host of GKE): the machine's metadata, which JAX asks then, may not be there."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", ",")
    return "," not in hosts and not {"TPU_PROCESS_ADDRESSES_PATH", "MEGASCALE_NUM_SLICES"} & os.environ.keys()


def _num_tasks(cluster: Any) -> int:
    # In the shell of an allocation (salloc) SLURM_NTASKS is what a later srun would start; the shell itself is a step of one task.
    step = os.environ.get("SLURM_STEP_NUM_TASKS") if cluster.name == "slurm" else None
    return int(step) if step else cluster.get_process_count()


def own_devices(cluster: Any) -> list[int] | None:
    """GPUs of this task; None: all that it sees.

    JAX gives one device to a task under SLURM and Open MPI. Here a task that is alone on its host has all of them, several share
    them evenly, and what the launcher has already bound to a task is its own.

    Raises:
      InputError: tasks that cannot share the GPUs of their host evenly.
    """
    number = cluster.get_local_process_id()
    if number is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    tasks, on_host = _tasks_here(), os.environ.get("SLURM_GPUS_ON_NODE", "")
    seen = next((os.environ[name] for name in _VISIBLE if os.environ.get(name)), "")
    visible = len(seen.split(",")) if seen else int(on_host) if on_host.isdigit() else None
    if tasks == 1:
        return None
    if visible is None or tasks is None:
        return [number]
    bound = "SLURM_GPUS_PER_TASK" in os.environ or (on_host.isdigit() and visible < int(on_host))
    if bound or visible < tasks:
        return None
    if visible % tasks:
        raise InputError(f"{tasks} processes on one host cannot share its {visible} GPUs evenly; start one process on each host")
    share = visible // tasks
    return list(range(number * share, (number + 1) * share))


def _tasks_here() -> int | None:
    """Tasks on this host; None: nobody says."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")  # 4(x2),3
    per_node = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed) for _ in range(int(times or 1))]
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return per_node[node] if node < len(per_node) else None
