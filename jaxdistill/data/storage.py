"""The folder of a token store while it is being made: here, or below a URL that fsspec writes to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxdistill.errors import InputError
from jaxdistill.redaction import first_line
from jaxdistill.urls import is_url, local_path

LOCK = "lock"
CLIENTS = {
    "gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp",
    "https": "aiohttp",
}  # fmt: skip

logger = logging.getLogger(__name__)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
      InputError: an unknown protocol, no client for it, or no credentials.
    """
    import fsspec

    protocol = url.partition("://")[0].lower()
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        install = f"pip install {CLIENTS[protocol]}" if protocol in CLIENTS else first_line(str(error))
        raise InputError(f"{url}: the client of {protocol}:// is not installed: {install}") from None
    except Exception as error:  # every client has its own types
        raise InputError(f"{url}: cannot be opened: {first_line(str(error))}") from None


def open_folder(place: str | Path, *, verify: bool = False) -> Folder:
    """The folder at a path or URL; nothing is written or asked for yet. `verify`: objects are read before they are believed whole."""
    return RemoteFolder(str(place), verify=verify) if is_url(place) else Folder(local_path(place))


class Folder:
    """A folder here. A file in it is there with all of its data or not at all, even if the machine stops."""

    def __init__(self, path: Path):
        self.place: str | Path = path
        self.path = path

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be made a folder: {error.strerror}") from error

    def names(self) -> set[str]:
        return set(os.listdir(self.path)) if self.path.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        """The data of a file, None if there is none."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file to write, which gets its name when the block ends; a block that fails leaves nothing.

        Raises:
          InputError: the disk is full or the folder cannot be written to.
        """
        temporary = self.path / f"{name}.tmp"
        try:
            try:
                yield temporary
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
                folder = os.open(self.path, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)  # of a full disk it takes what is left
                raise
        except OSError as error:
            raise InputError(
                f"{self.path / name}: cannot be written: {error.strerror or error}; what is finished stays, and the same command goes on"
            ) from error

    def write(self, name: str, data: bytes) -> str:
        """Writes a whole file; returns its sha256."""
        with self.writing(name) as path:
            path.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the file is there, undamaged."""
        try:
            with open(self.path / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError:
            return False

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Deletes the folder if it holds nothing but the lock."""
        if self.names() <= {LOCK}:
            self.delete(LOCK)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the store's lock; while another process prepares the same store, says so and waits. The lock dies with its process."""
        while True:
            self.make()
            try:
                file = open(self.path / LOCK, "w")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written to: {error.strerror}") from error
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("%s: another process is preparing this token store; waiting for it", self.path)
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_there(file):
                    yield
                    return

    def _is_there(self, file: TextIO) -> bool:
        """Whether this is still the lock: who held it before may have failed and taken the empty folder away."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path / LOCK))
        except FileNotFoundError:
            return False


class RemoteFolder(Folder):
    """A folder below a URL. An object is put there whole or not at all; there is no lock: one prepare at a time."""

    def __init__(self, url: str, *, verify: bool = False):
        if url.startswith("hf://"):
            raise InputError(f"{url}: the Hub is read, not written to (every file would be a commit): upload a finished store instead")
        self.place = url.rstrip("/")
        self._fs, self._root = filesystem(self.place)
        self._known: set[str] | None = None
        self._verify = verify

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # every client has its own types
            raise InputError(f"{self.place}: {what}: {first_line(str(error))}; what is finished stays") from error

    def make(self) -> None:
        """Nothing to make: names of objects hold slashes."""

    def names(self) -> set[str]:
        with self._asking("cannot be listed"):
            self._fs.invalidate_cache()
            try:
                self._known = {path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
            except FileNotFoundError:
                self._known = set()
        return set(self._known)

    def read(self, name: str) -> bytes | None:
        with self._asking(f"{name} cannot be read"):
            try:
                return self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> str:
        with self._asking(f"{name} cannot be written"):
            self._fs.pipe_file(f"{self._root}/{name}", data)
        return hashlib.sha256(data).hexdigest()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        raise InputError(f"{self.place}: {name} is written bit by bit, which needs a folder of a file system")
        yield

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the object is there; to verify it is read, else its name is believed: it was put whole, and reading all costs hours."""
        if self._verify:
            data = self.read(name)
            return data is not None and hashlib.sha256(data).hexdigest() == sha256
        return name in (self.names() if self._known is None else self._known)

    def delete(self, name: str) -> None:
        with self._asking(f"{name} cannot be deleted"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def remove_if_empty(self) -> None:
        """An empty folder is none."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
