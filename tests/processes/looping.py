"""One of several processes that compute together for ever."""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdistill import cli, processes
from jaxdistill.errors import InputError


def loop(fails: int) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_process_local_data(sharding, np.ones(1, np.float32), (jax.device_count(),))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    step = 0
    while True:
        total(x).block_until_ready()
        step += 1
        if step == 1:
            print("computing", file=sys.stderr, flush=True)
        if step == 20 and processes.index() == fails:
            raise InputError("the disk of this host is full")


@cli.app.command()
@cli._joins()
def looping(fails: int = -1) -> None:
    loop(fails)


if __name__ == "__main__":
    cli.main()
