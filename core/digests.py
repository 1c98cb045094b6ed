"""What files hold: digests of content, remembered for large files, and the identity of a model.

Sizes and times of modification do not tell two files apart: a copy keeps the time, and weights of
one shape have one size. So content is what counts, for weights of any size.
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

# What identifies the folder of a model; the records of the stage that made it are no part of it.
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
SMALL_BYTES = 2**24  # files up to here are read by every process that asks
SETTLED_SECONDS = 2.0  # two writes within the clock of a file system have the same time

_known_digests: dict[str, str] = {}  # of this process, by `version_of`


# ---- digests -------------------------------------------------------------------------------------


def content_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: remembered until the file is written to or replaced.

    A model of 15 GB takes ten seconds or so the first time, and none after that.
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
    """A text that changes whenever the file does, also where its time of modification is set back:
    the time of the last change of an inode is set by the system alone."""
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {times}"


def is_settled(path: Path, now: float) -> bool:
    """Whether a further write would show in the times of a file that is as old as this one."""
    status = path.stat()
    # On Windows st_ctime is when a file was created.
    return os.name != "nt" and now - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS


def note_of(version: str) -> Path:
    """Where the digest of a version of a file is kept, in the cache."""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    name = hashlib.sha256(version.encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(cache, "recipes", "digests", name).expanduser()


def recall_digest(path: Path, version: str) -> str | None:
    """The digest of a large file from an earlier process; None if none is known."""
    if path.stat().st_size <= SMALL_BYTES:
        return None
    try:
        digest = note_of(version).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def remember_digest(path: Path, version: str, digest: str) -> None:
    """Keep a digest in this process, and that of a large file for later ones."""
    _known_digests[version] = digest
    if path.stat().st_size <= SMALL_BYTES:
        return
    note = note_of(version)
    # Without a cache the file is read again next time.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(note) as file:
            file.write(digest)


# ---- files and models ----------------------------------------------------------------------------


def file_identity(path: Path) -> Any:
    """A JSON value that changes with the content of a file, or of a model's folder; None if there
    is no such path, or a folder of another kind. An adapter includes the base that it names."""
    path = path.expanduser()
    if path.is_file():
        return content_digest(path)
    identity: list[Any] = [[name, digest] for name, digest in folder_digests(path).items()]
    base = base_of_adapter(path)
    if base is None:
        return identity or None
    # A base that is an adapter itself is not followed: it is loaded as a plain model.
    is_file = base.is_file()
    identity.append(["base", content_digest(base) if is_file else folder_digests(base)])
    return identity


def folder_digests(folder: Path) -> dict[str, str]:
    """{name: digest} of the files that make the model in a folder."""
    files: set[Path] = set()
    for pattern in MODEL_FILES:
        files.update(folder.glob(pattern))
    return {file.name: content_digest(file) for file in sorted(files) if file.is_file()}


def base_of_adapter(folder: Path) -> Path | None:
    """Where the base of the adapter in a folder would be on this machine; None for a base that is
    not here, such as a hub name, and for other folders."""
    try:
        settings = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        return existing_path(settings["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # what is wrong with it is said when it is loaded


def existing_path(text: str) -> Path | None:
    """The path that a text is, if there is one; a prompt or a template is none."""
    # The operating system refuses long names and zero bytes; a "~" may stand before any word.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    return None


def find_changed_files(folder: Path, saved: Mapping[str, str]) -> dict[str, str]:
    """{name: what happened to it} of those files that were `saved` in a folder, {name: digest}, and
    are other ones today; empty if all weights were deleted."""
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
