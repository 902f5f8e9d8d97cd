"""What processes tell each other about a run: JSON through the coordination service of `jax.distributed`, no device involved."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError

# A text may take days to prepare while the others wait for it; whoever is lost meanwhile is the watch's business, not a timeout's.
_PATIENCE_MS = 30 * 24 * 3600 * 1000
_NFS_SECONDS = 30.0  # what one host writes may be that late on another
_calls = itertools.count()  # every process makes the same calls in the same order


def client() -> Any:
    """Of the coordination service; None where `jax.distributed` is not initialised. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def index() -> int:
    """Number of this process, 0 to count() - 1."""
    from jax._src import distributed

    return distributed.global_state.process_id if client() else 0


def count() -> int:
    """Processes of this run. Asks no device."""
    from jax._src import distributed

    return distributed.global_state.num_processes if client() else 1


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return index() == 0


def from_main(value: Any) -> Any:
    """The main process's value on every process; JSON. On one process the value itself."""
    if count() == 1:
        return value
    key = f"jaxdistill/said/{next(_calls)}"
    if is_main():
        client().key_value_set(key, json.dumps(value))
    return json.loads(client().blocking_key_value_get(key, _PATIENCE_MS))


def gathered(value: Any) -> list[Any]:
    """Every process's value, in their order, on every process; JSON."""
    if count() == 1:
        return [value]
    key = f"jaxdistill/gathered/{next(_calls)}"
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    values = [json.loads(client().blocking_key_value_get(f"{key}/{i}", _PATIENCE_MS)) for i in range(count())] if is_main() else None
    return from_main(values)


def barrier() -> None:
    """Returns when every process has come here."""
    gathered(None)


def check_shared(folder: Path, field: str = "output") -> None:
    """Raises InputError on a process that does not see what the main one writes in a folder, or cannot write there."""
    if count() == 1:
        return
    token = folder / f".shared-{from_main(uuid.uuid4().hex)}"
    own = token.with_name(f"{token.name}-{index()}")
    with together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        except OSError as error:
            raise InputError(f"{field}: {folder} on {socket.gethostname()} cannot be written: {error.strerror}") from None
    theirs, until = token.with_name(f"{token.name}-0"), time.monotonic() + _NFS_SECONDS
    found = theirs.name in os.listdir(folder)
    while not found and time.monotonic() < until:
        time.sleep(0.5)
        found = theirs.name in os.listdir(folder)
    barrier()
    own.unlink()
    with together():
        if not found:
            raise InputError(f"{field}: {folder} on {socket.gethostname()} is not the folder of process 0; give one that all hosts share")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around work whose input may be wrong on one process alone: an InputError of any is raised by all at its end, in the same words.

    The processes do not talk to each other within it: one that has failed would leave the others waiting.
    """
    found: InputError | None = None
    try:
        yield
    except InputError as error:
        found = error
    messages = gathered(None if found is None else str(found))
    wrong = [(number, message) for number, message in enumerate(messages) if message is not None]
    if not wrong:
        return
    number, message = wrong[0]
    raise InputError(message if len(messages) == len(wrong) or number == 0 else f"process {number}: {message}") from found
