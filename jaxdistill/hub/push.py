"""A folder as a repository of the Hub, in one commit; what was uploaded is compared with what lies there afterwards."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jaxdistill.card import card_of
from jaxdistill.errors import InputError
from jaxdistill.models import may_pass, network_errors, refusal, status_of
from jaxdistill.redaction import redacted

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?")
_BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*")
# Files of a student: what a new push does not bring of them goes away with it. Others are left alone.
_OURS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "mlm/*",
)


@dataclass(frozen=True)
class Push:
    """Where to: `owner/name`, and whether all may see it."""

    repository: str
    public: bool = False
    revision: str = "main"

    def names(self, students: Sequence[str]) -> dict[str, str]:
        """Student -> repository: of several students each has its own, `owner/name-<student>`.

        Raises:
          InputError: a name that the Hub could not have.
        """
        if not _BRANCH.fullmatch(self.revision) or ".." in self.revision:
            raise InputError(f"--revision: {self.revision!r} is no name of a branch")
        several = len(students) > 1
        found = {name: f"{self.repository}-{name}" if several else self.repository for name in students}
        for repository in found.values():
            too_long = any(len(part) > 96 for part in repository.split("/"))
            if not _REPOSITORY.fullmatch(repository) or too_long or "--" in repository or ".." in repository or repository.endswith(".git"):
                raise InputError(
                    f"--push: {repository!r} is no repository of the Hub: owner/name, letters, digits, '.', '_' and single '-', at most 96"
                )
        return found


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push. `files`: path -> (size, sha256 of a large file or git's hash of a small one)."""

    repository: str
    there: bool = False
    private: bool = True
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    unknown: str = ""  # why it could not be asked


@contextmanager
def _said_in_one_line(repository: str, what: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"--push: {repository} is gated, and your account has not been let in; nothing was changed") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"--push: {repository} is not there, or not yours to {what}: log in as its owner (`hf auth login`)") from None
    except errors.BadRequestError as error:
        said = error.server_message or str(error)
        raise InputError(f"--push: the Hub does not take {repository}: {said}") from None
    except ValueError as error:  # an answer that the client cannot read, metadata that the Hub does not take
        raise InputError(f"--push: the Hub does not take {repository}: {error}") from None
    except (*network_errors(), RuntimeError) as error:
        said, status = refusal(error), status_of(error)
        if what == "write" and status == 403:
            said += f"; {repository.partition('/')[0]} must be an account or an organisation that it may write to"
        elif what == "write" and may_pass(status):
            said += "; the same command goes on: what the Hub has already is not sent again"
        raise InputError(f"--push: {repository}: {said}") from None


def look(push: Push, repository: str, *, dry_run: bool, overwrite: bool) -> Remote:
    """What there is under the name, asked before anything is computed.

    Raises:
      InputError: no token, no network, or a repository that is not to be written: public without --public, or of other making.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None and not dry_run:
        raise InputError("--push: no token of the Hub; log in with `hf auth login` (a token with write access), or set HF_TOKEN")
    try:
        with _said_in_one_line(repository, "read"):
            remote = _ask(HfApi(), push, repository)
    except InputError as error:
        if not dry_run:
            raise
        return Remote(repository, unknown=str(error).removeprefix("--push: "))
    problem = ""
    if remote.there and not remote.private and not push.public:
        problem = f"{repository} is public; say --public to push where all can see it"
    elif set(remote.files) - {".gitattributes"} and not overwrite and not _is_ours(HfApi(), push, repository):
        problem = f"{repository} holds {len(remote.files)} files that jaxdistill did not write; give another name, or --overwrite"
    if problem and not dry_run:
        raise InputError(f"--push: {problem}")
    return Remote(repository, remote.there, remote.private, remote.files, problem)


def _ask(api: Any, push: Push, repository: str) -> Remote:
    from huggingface_hub import errors

    try:
        info = api.model_info(repository)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return Remote(repository)
    try:
        files = _files(api, repository, push.revision)
    except errors.RevisionNotFoundError:
        files = {}  # a branch that the push makes
    return Remote(repository, True, bool(info.private), files)


def _files(api: Any, repository: str, revision: str) -> dict[str, tuple[int, str]]:
    entries = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in entries if hasattr(entry, "blob_id")}


def _is_ours(api: Any, push: Push, repository: str) -> bool:
    """Whether its card says so."""
    from huggingface_hub import errors

    with tempfile.TemporaryDirectory() as cache, _said_in_one_line(repository, "read"):
        try:
            card = api.hf_hub_download(repository, "README.md", revision=push.revision, cache_dir=cache)
        except errors.RemoteEntryNotFoundError:
            return False
        return "jaxdistill" in (card_of(Path(card).parent).get("tags") or ())


def push_folder(folder: Path, push: Push, remote: Remote) -> str:
    """Upload the files of a folder in one commit, making the repository if there is none; returns its address at that commit.

    Raises:
      InputError: the Hub refuses, cannot be reached, or holds something else afterwards.
    """
    from huggingface_hub import HfApi, get_token

    api, repository, ours = HfApi(token=get_token()), remote.repository, local_files(folder)
    address = f"{api.endpoint}/{repository}"
    seen = visibility(push, remote)
    with _said_in_one_line(repository, "write"):
        if not remote.there:
            api.create_repo(repository, private=not push.public, exist_ok=True)
        if push.revision != "main":
            api.create_branch(repository, branch=push.revision, exist_ok=True)
            remote = _ask(api, push, repository)  # a new branch begins as the main one
        stale = _stale(remote, ours)
        if not stale and all(_is_same(remote, path, each) for path, each in ours.items()):
            return f"{address} holds these very files already ({seen})"
        commit = _commit(api, folder, push, repository, ours, stale)
        there = _files(api, repository, commit)
    wrong = [path for path, each in ours.items() if there.get(path, (0, ""))[1] not in each[1:]]
    if wrong:
        raise InputError(f"--push: {repository} at {commit} does not hold what was sent: {wrong[0]} differs; push again")
    return f"{address}/tree/{commit} ({seen}; {len(ours)} files, their hashes as here)"


def visibility(push: Push, remote: Remote) -> str:
    """Who sees the repository after a push, and why where that is not what was asked for."""
    if not (remote.private if remote.there else not push.public):
        return "public"
    return "private" + (" as before: --public is for new repositories, this one's settings on the Hub change it" if push.public else "")


def local_files(folder: Path) -> dict[str, tuple[int, str, str]]:
    """Path in the folder -> size, sha256 and git's hash. Links are no files of a student."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        size = path.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                git.update(block)
        found[path.relative_to(folder).as_posix()] = (size, sha256.hexdigest(), git.hexdigest())
    return found


def _is_same(remote: Remote, path: str, local: tuple[int, str, str]) -> bool:
    return path in remote.files and remote.files[path][1] in local[1:]


def _stale(remote: Remote, ours: dict[str, Any]) -> list[str]:
    return [path for path in remote.files if path not in ours and any(fnmatch(path, pattern) for pattern in _OURS)]


def _commit(api: Any, folder: Path, push: Push, repository: str, ours: dict[str, Any], stale: list[str]) -> str:
    """One commit with everything, where `upload_folder` might make several."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils import logging

    with ExitStack() as stack:
        # Given as open files, they go by plain LFS: the client would take xet without asking whether the Hub has it.
        has_xet = _has_xet(api, repository, push.revision)
        verbosity = logging.get_verbosity()
        stack.callback(logging.set_verbosity, verbosity)
        logging.set_verbosity_error()  # of plain LFS it would warn
        operations: list[Any] = [CommitOperationDelete(path) for path in stale]
        for path in ours:
            content = str(folder / path) if has_xet else stack.enter_context((folder / path).open("rb"))
            operations.append(CommitOperationAdd(path, content))
        message = f"{folder.name}, exported by jaxdistill"
        return api.create_commit(repository, operations, commit_message=message, revision=push.revision).oid


def _has_xet(api: Any, repository: str, revision: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    if api.endpoint.rstrip("/") == "https://huggingface.co":
        return True
    url = f"{api.endpoint}/api/models/{repository}/xet-write-token/{revision}"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token))
    return answer.status_code == 200 and constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT in answer.headers


def show(folder: Path, push: Push | None, remote: Remote | None, target: Path) -> None:
    """The dry run: files with sizes and what becomes of them, where to, and the card."""
    ours = local_files(folder)
    total = sum(size for size, *_ in ours.values())
    if push is None or remote is None:
        print(f"would write {len(ours)} files, {total:,} bytes, to {target}{' (which exists)' if target.exists() else ''}")
        states = dict.fromkeys(ours, "")
    else:
        state = (
            "exists"
            if remote.there
            else f"cannot be asked: {remote.unknown}"
            if remote.unknown
            else "would be created (or is not shown to you)"
        )
        where = f"{remote.repository}, branch {push.revision}, {visibility(push, remote)}"
        print(f"would push {len(ours)} files, {total:,} bytes, to {where}; it {state}")
        if remote.there and remote.unknown:
            print(f"would be refused: {remote.unknown}")
        changed = {path: "same" if _is_same(remote, path, each) else "changed" for path, each in ours.items() if path in remote.files}
        states = {path: changed.get(path, "new") for path in ours} if not (remote.unknown and not remote.there) else dict.fromkeys(ours, "")
        states |= dict.fromkeys(_stale(remote, ours), "removed")
    for path, state in states.items():
        print(f"  {ours[path][0] if path in ours else remote.files[path][0]:>13,}  {path}{f'  ({state})' if state else ''}")
    print(f"\n{folder.name}/README.md:\n\n{redacted((folder / 'README.md').read_text(encoding='utf-8'))}")
