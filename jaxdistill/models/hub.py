"""Where a model lies: a folder here, or a snapshot of the Hub at one commit."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.errors import InputError

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What is fetched of a repository, which may also hold ONNX, OpenVINO, TensorFlow and pickled copies of the weights.
_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
]
_FILES += ["vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "added_tokens.json"]
_FILES += ["mlm/config.json", "mlm/model.safetensors"]  # as an export has its MLM head
_CARD = "README.md"  # it says the licence


def find_model(path_or_hub_id: str | Path) -> Path:
    """The folder of a model; one of the Hub (`name`, `owner/name`, `owner/name@revision`) is fetched into the Hub's own cache first.

    Raises:
      InputError: neither a folder nor a model of the Hub, a revision that it does not have, or the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if os.path.isdir(path):  # which is False for what cannot be a path at all
        return path
    if os.path.exists(path):
        raise InputError(f"{path}: not a model folder but a file; give the folder that holds config.json and model.safetensors")
    name = str(path_or_hub_id)
    hub_id, revision = split_revision(name)
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise InputError(f"{name if name.isprintable() else repr(name)}: no such model folder")
    return _fetch(name, hub_id, revision)


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` in its two parts; what is no Hub id is left whole."""
    found = _HUB_ID.fullmatch(name)
    return (found["name"], found["revision"]) if found else (name, None)


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """Hub id and commit of a folder that is a snapshot in the Hub's cache; None: any other folder."""
    repo = folder.absolute().parent.parent.name
    if folder.absolute().parent.name != "snapshots" or not repo.startswith("models--") or not COMMIT.fullmatch(folder.name):
        return None
    return repo.removeprefix("models--").replace("--", "/"), folder.name


def pinned(path_or_hub_id: str) -> str:
    """A Hub id with the commit that it means now, as `owner/name@commit`; a folder's path as it is. Raises as `find_model`."""
    folder = find_model(path_or_hub_id)
    origin = None if os.path.isdir(os.path.expanduser(path_or_hub_id)) else hub_origin(folder)
    return f"{split_revision(path_or_hub_id)[0]}@{origin[1]}" if origin else path_or_hub_id


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises when something else than its caller is at fault: its own errors and those of httpx below it."""
    from huggingface_hub import errors

    # Which httpx it uses (httpx, httpx2) depends on its version; its own errors derive from that one's.
    http = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return http, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError


def status_of(error: Exception) -> int | None:
    """What the Hub answered with; None where it did not answer."""
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in _chain(error)]
    return next((status for status in statuses if status), None)


def _chain(error: Exception) -> list[BaseException]:
    """The error and what it came from."""
    chain, seen = [error], error
    while (seen := seen.__cause__ or seen.__context__) and len(chain) < 10:
        chain.append(seen)
    return chain


def refusal(error: Exception) -> str:
    """Why the Hub did not do what it was asked for, in a few words; no token, no address with one."""
    status = status_of(error)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "the Hub could not be reached (HF_HUB_OFFLINE is set)"
    if status == 401:
        return "the Hub does not accept the token; log in again with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return "the Hub forbids it (403): the token lacks the permission; give one that has it (`hf auth login`)"
    where = f" at {os.environ['HF_ENDPOINT']} (HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else ""
    if status == 404 and where:
        return f"the Hub{where} answered 404 as no Hub does; correct HF_ENDPOINT"
    if status:
        return f"the Hub{where} answered {status}" + ("; try again later" if may_pass(status) else "")
    return f"the Hub{where} could not be reached: {type(_chain(error)[-1]).__name__}"


def may_pass(status: int | None) -> bool:
    """Whether the same request may succeed another time."""
    return status is None or status >= 500 or status in (408, 429)


def no_such_dataset(error: Exception, revision: str | None) -> str | None:
    """Why the Hub has no such dataset for us, in a few words; None: something else was wrong."""
    from huggingface_hub import errors

    for each in _chain(error):
        if isinstance(each, errors.HFValidationError):
            return "the Hub has no datasets of such names; a file or folder is given as path"
        if isinstance(each, errors.GatedRepoError):
            return "a gated dataset of the Hub; accept its terms there and log in with `hf auth login`"
        if isinstance(each, errors.RevisionNotFoundError):
            return f"the Hub has the dataset but no revision {revision!r} of it"
        if isinstance(each, errors.RepositoryNotFoundError):
            return "no dataset that the Hub shows you (a private one needs `hf auth login`)"
    return None


def _fetch(name: str, hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors

    try:
        return _snapshot(hub_id, revision)
    except errors.HFValidationError:
        raise InputError(f"{name}: no such model folder, and the Hub has no such names") from None
    except errors.GatedRepoError:
        raise InputError(f"{name}: a gated model of the Hub; accept its terms there and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: the Hub has the model but no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name}: neither a folder here nor a model that the Hub shows you (a private one needs `hf auth login`)"
        ) from None
    except network_errors() as error:
        raise InputError(
            f"{name}: no such folder here, and {refusal(error)}; check the network, or give the folder of a downloaded model"
        ) from None


def _snapshot(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=[*_FILES, _CARD]))
    except errors.LocalEntryNotFoundError as error:
        try:  # without a network, what another tool fetched may lack the card
            return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_FILES, local_files_only=True))
        except network_errors():
            raise error from error.__cause__  # which says what the Hub answered


def weight_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of each file of weights in a model folder, as `sha256sum` and the Hub show it."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def sha256_of_weights(files: Mapping[str, str]) -> str:
    """The identity of a model's weights, in checkpoints and results: sha256 of the digests in `weight_files`, not of a file."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()


def weights_sha256(folder: Path) -> str:
    """Hash of the weights in a model folder: the same wherever the folder lies."""
    return sha256_of_weights(weight_files(folder))
