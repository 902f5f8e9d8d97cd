"""Where a model lies: a folder here, or a snapshot of the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from jaxdistill.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Top level only: repositories also carry ONNX, OpenVINO and TensorFlow copies of the weights.
_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
]
_FILES += ["vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "added_tokens.json"]


def find_model(path_or_hub_id: str | Path) -> Path:
    """The folder of a model; a Hub id (`name` or `owner/name`) is fetched into the Hub's own cache first.

    Raises:
      InputError: neither a folder nor a model of the Hub, or the Hub cannot be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: not a model folder but a file; give the folder that holds config.json and model.safetensors")
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such model folder")
    return _fetch(name)


def _fetch(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except errors.HFValidationError:
        raise InputError(f"{name}: no such model folder, and the Hub has no such names") from None
    except errors.GatedRepoError:
        raise InputError(f"{name}: a gated model of the Hub; accept its terms there and log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name}: neither a folder here nor a model that the Hub shows you (a private one needs `hf auth login`)"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise InputError(
            f"{name}: no such folder here, and the Hub could not be reached{offline}: {type(error).__name__}; "
            f"check the network, or give the folder of a downloaded model"
        ) from None


def weights_sha256(folder: Path) -> str:
    """Hash of the weights in a model folder: the same wherever the folder lies."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
