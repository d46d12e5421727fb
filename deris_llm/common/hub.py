"""Weights on the Hugging Face hub, kept in its cache: first small files, then headers of tensors, last the tensors. Uploads."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")
"""Globs: configs, tokenizers, processors, lists of weight files."""

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^\s@]+))?")


class HubName(NamedTuple):
    """`owner/name` or `owner/name@revision`, as a run config writes it."""

    repo: str
    revision: str | None  # branch, tag or commit; None = the default branch

    @classmethod
    def parsed(cls, name: str) -> HubName | None:
        """Reads a name; None: it has another form."""
        match = None if name.startswith(".") else _NAME.fullmatch(name)
        return None if match is None else cls(match[1], match[2])


def small_files(hub: HubName) -> Path:
    """Downloads everything but weights; later calls of this process return the same commit.

    Returns:
        folder of the commit in the hub's cache; without network it has what was downloaded before.

    Raises:
        OSError: the repository or the revision does not exist, or can not be reached and was never downloaded.
    """
    return _small_files(hub, constants.HF_HUB_CACHE)


@functools.cache
def _small_files(hub: HubName, cache: str) -> Path:  # by cache: a process that changes it means another folder
    try:
        return Path(
            snapshot_download(hub.repo, revision=hub.revision, allow_patterns=list(SMALL_FILES), cache_dir=cache)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):  # what else is lacking is named where it is needed
        config = try_to_load_from_cache(hub.repo, "config.json", revision=hub.revision, cache_dir=cache)
        if not isinstance(config, str):
            raise
        return Path(config).parent


def download_all(hub: HubName) -> Path:
    """Downloads a repository, or finds it in the cache, and returns its folder.

    Raises:
        OSError: the repository or the revision does not exist, or it cannot be reached and was never downloaded.
    """
    return Path(snapshot_download(hub.repo, revision=hub.revision))


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--") else None


def has_file(hub: HubName, folder: Path, file: str) -> bool:
    """Whether the commit whose folder this is has a file on the hub."""
    return HfApi().file_exists(hub.repo, file, revision=commit_of(folder))


def header_of(hub: HubName, folder: Path, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a .safetensors on the hub, without its tensors.

    Args:
        hub: the repository.
        folder: of the commit, see `small_files`.
        file: its name.

    Raises:
        OSError: the repository has no such file, or no header can be read in it.
    """
    try:
        header = HfApi().parse_safetensors_file_metadata(hub.repo, file, revision=commit_of(folder))
    except (EntryNotFoundError, SafetensorsParsingError) as error:
        raise OSError(f"{file} of {hub.repo}: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}


def download(hub: HubName, folder: Path, files: Sequence[str]) -> None:
    """Downloads files of the commit whose folder this is; those that are there are kept."""
    lacking = [file for file in files if not (folder / file).exists()]
    if lacking:
        snapshot_download(hub.repo, revision=commit_of(folder), allow_patterns=lacking, cache_dir=folder.parents[2])


def check_login(token: str | None = None) -> None:
    """Asks the hub whose token this is.

    Args:
        token: None = that of `hf auth login` or of HF_TOKEN.

    Raises:
        OSError: no token, one that the hub does not know, or no network.
    """
    with _network_errors_as_oserror():
        HfApi(token=token).whoami()


def upload(repo: str, folder: Path, *, private: bool | None, message: str, token: str | None = None) -> str:
    """Uploads a folder to the default branch; the repository is created if it does not exist.

    Args:
        repo: `owner/name`.
        folder: what it will hold; other files that are there stay.
        private: whether a new repository is; None = as the owner's settings say.
        message: of the commits.
        token: None = that of `hf auth login` or of HF_TOKEN.

    Returns:
        URL of the commit (the last one: huggingface_hub divides large folders).

    Raises:
        OSError: the token may not write there, or no network.
    """
    api = HfApi(token=token)
    with _network_errors_as_oserror():
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url


@contextlib.contextmanager
def _network_errors_as_oserror() -> Iterator[None]:
    """Turns errors of connections, which are no OSError in every version of huggingface_hub, into one."""
    http_error = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version uses
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not isinstance(error, http_error):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
