"""Digests of file contents, cached for large files, and the identity of a model.

Size and modification time do not identify a file: a copy may keep the time, and weights of the same
shape have the same size. So files are compared by content, even large weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import atomic_writer, file_digest
from core.screen import busy

# Files that identify a model folder; the records of the stage that made it are not included.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "added_tokens*",
    "special_tokens*",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.py",  # with trust_remote_code
)
SMALL_BYTES = 2**24  # digests of files up to this size are not cached on disk
SETTLED_SECONDS = 2.0  # writes within a tick of the file system's clock have the same time

_known_digests: dict[str, str] = {}  # {`version_of`: digest}, of this process


# ---- digests -------------------------------------------------------------------------------------


def content_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; cached until the file is written to or replaced.

    A model of 15 GB takes about ten seconds the first time, and no time after that.
    """
    began = time.time()
    version = version_of(path)
    digest = _known_digests.get(version) or recall_digest(path, version)
    if digest is None:
        with busy(f"reading {path.name}"):
            digest = file_digest(path)
        if is_settled(path, began) and version_of(path) == version:
            remember_digest(path, version, digest)
    return digest


def version_of(path: Path) -> str:
    """A text that changes whenever the file does, even if its modification time is set back: only
    the system sets the time of the last inode change."""
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {times}"


def is_settled(path: Path, now: float) -> bool:
    """Whether the file is old enough that a further write would change its times."""
    status = path.stat()
    # On Windows st_ctime is the creation time.
    return os.name != "nt" and now - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS


def note_of(version: str) -> Path:
    """The cache file for the digest of a version of a file."""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    name = hashlib.sha256(version.encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(cache, "recipes", "digests", name).expanduser()


def recall_digest(path: Path, version: str) -> str | None:
    """The digest of a large file cached by an earlier process; None if there is none."""
    if path.stat().st_size <= SMALL_BYTES:
        return None
    try:
        digest = note_of(version).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def remember_digest(path: Path, version: str, digest: str) -> None:
    """Cache a digest in this process, and for a large file also on disk."""
    _known_digests[version] = digest
    if path.stat().st_size <= SMALL_BYTES:
        return
    note = note_of(version)
    # If the cache cannot be written, the file is read again next time.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(note) as file:
            file.write(digest)


# ---- files and models ----------------------------------------------------------------------------


def file_identity(path: Path) -> Any:
    """A JSON value that changes with the content of a file or model folder; None for other folders
    and missing paths. The identity of an adapter includes the base model that it names."""
    path = path.expanduser()
    if path.is_file():
        return content_digest(path)
    identity: list[Any] = [[name, digest] for name, digest in folder_digests(path).items()]
    base = base_of_adapter(path)
    if base is None:
        return identity or None
    # If the base is an adapter itself, its own base is not followed: it is loaded as a plain model.
    is_file = base.is_file()
    identity.append(["base", content_digest(base) if is_file else folder_digests(base)])
    return identity


def folder_digests(folder: Path) -> dict[str, str]:
    """{name: digest} of the files of the model in a folder."""
    files: set[Path] = set()
    for pattern in MODEL_FILES:
        files.update(folder.glob(pattern))
    return {file.name: content_digest(file) for file in sorted(files) if file.is_file()}


def base_of_adapter(folder: Path) -> Path | None:
    """The local path of the base model of the adapter in a folder; None if the base is not on this
    machine, such as a hub name, or if the folder has no adapter."""
    try:
        settings = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        return existing_path(settings["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # errors are reported when it is loaded


def existing_path(text: str) -> Path | None:
    """The text as a path, if that path exists; None for prompts, templates and the like."""
    # The operating system refuses long names and zero bytes; "~" may precede any word.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    return None


def find_changed_files(folder: Path, saved: Mapping[str, str]) -> dict[str, str]:
    """{name: what happened} for the files in `saved`, {name: digest}, that changed in a folder;
    empty if all weights were deleted."""
    weights = [name for name in saved if name.endswith(".safetensors")]
    if not any((folder / name).exists() for name in weights):
        return {}
    changes = {}
    for name, digest in saved.items():
        file = folder / name
        if not file.is_file():
            changes[name] = "is missing"
        elif content_digest(file) != digest:
            changes[name] = "is not the file that was saved"
    return changes
