"""Atomic writing, digests, caches and disk space."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock

from core.errors import ConfigError
from core.runtime import is_main_process, logger, wait_for_everyone
from core.screen import busy

# Increased when checkpoints change so that older code cannot read them.
CHECKPOINT_FORMAT = 1
# Files in every checkpoint, besides those of the optimizer and of further processes.
ALWAYS_IN_CHECKPOINT = ("options.json", "state.json", "weights.safetensors", "random-0.safetensors")

# ---- digests and disk space ----------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str:
    """What is wrong with the checkpoint in `folder`, according to its manifest; "" if intact."""
    if not folder.is_dir():
        return "it is not a folder"
    try:
        digests = read_manifest(folder)
        damaged = [name for name in digests if file_digest(folder / name) != digests[name]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "manifest.json is damaged"
    except OSError as error:  # a folder or a loop of links in place of a file
        return f"{Path(error.filename or '').name} cannot be read ({error.strerror})"
    if damaged:
        return f"{', '.join(damaged)} is damaged"
    if not digests:
        return "manifest.json is empty"
    unlisted = [name for name in ALWAYS_IN_CHECKPOINT if name not in digests]
    if unlisted:
        return f"manifest.json does not list {', '.join(unlisted)}"
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("format", CHECKPOINT_FORMAT) > CHECKPOINT_FORMAT:
        return "it was written by a newer version of these scripts"
    return ""


def read_manifest(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} from the manifest of a checkpoint. Raises OSError if it cannot be read,
    ValueError if it has another content."""
    digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(digests, dict) or not all(isinstance(key, str) for key in digests.values()):
        raise ValueError("no mapping of names to digests")
    return digests


def sealed_files(folder: Path) -> list[str]:
    """The names of the files in a checkpoint's manifest; none if it is damaged."""
    try:
        return list(read_manifest(folder))
    except (OSError, ValueError):
        return []


def check_disk_space(folder: str, needed: float) -> None:
    """Raise ConfigError if the disk of `folder` has fewer than `needed` bytes free."""
    path = Path(folder).absolute()
    # The folder itself may not have been created yet.
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"output_dir={folder}: the disk has {free / 1e9:.1f} GB left, and about "
            f"{needed / 1e9:.1f} GB will be written; make room, keep fewer checkpoints, "
            "or choose another disk"
        )


# ---- atomic writing ------------------------------------------------------------------------------


def unfinished_name(path: Path) -> Path:
    """The temporary path at which this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def remove_unfinished(folder: Path) -> None:
    """Delete half-written files of killed processes in a folder; nobody else may write there."""
    for path in folder.glob(".*.unfinished"):
        if not re.fullmatch(r"\..+\.\d+\.unfinished", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def has_weights(folder: str | Path | None) -> bool:
    """Whether a folder has the weights of a model."""
    return bool(folder) and any(Path(folder).glob("model*.safetensors"))


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` if the block ends without an error.
    `folder` must not exist yet, or be empty."""
    temporary = unfinished_name(folder)
    # A killed process may have had the same number, for example in a restarted container.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Yield a text file that replaces `path` once it has been synced to disk."""
    temporary = unfinished_name(path)
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, atomically."""
    with atomic_writer(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=number_or_text)
            file.write(line + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The objects in a file with one JSON object per line."""
    # Split bytes, because splitting text would also split inside values, at U+2028.
    lines = path.read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def number_or_text(value: Any) -> float | str:
    """Convert numbers of NumPy or PyTorch to float, and other non-JSON values to text."""
    if not hasattr(value, "__float__"):
        return str(value)
    try:
        return float(value)
    except (TypeError, ValueError):  # an array of several numbers
        return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_writer(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=number_or_text)


# ---- results of one process for all processes ----------------------------------------------------
#
# The others wait for the file to appear: a barrier of torch.distributed would time out if one
# process converts a model or queries a server for an hour.


def wait_for_path(path: Path) -> None:
    """Return once another process has created `path`."""
    while not path.exists():
        time.sleep(1)


def cached_folder(
    kind: str, files: Sequence[Path], build: Callable[[Path], None] | None, how: str = ""
) -> Path | None:
    """The cached folder for the content of `files`; `build(folder)` fills it the first time.

    `how` has what else the result depends on; `kind` says what is done, for the log. Without
    `build`, returns None if the folder does not exist yet.
    """
    content = hashlib.sha256()
    for file in files:
        content.update(bytes.fromhex(file_digest(file)))
    content.update(how.encode())
    key = content.hexdigest()[:32]
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    folder = Path(cache, "recipes", kind, key).expanduser()
    if folder.exists():
        return folder
    if build is None:
        return None
    shown = str(folder).replace(str(Path.home()), "~")
    logger.info("%s %s once, cached in %s", kind, files[0].name, shown)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process per machine builds the folder; other programs there wait for the lock.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with busy(f"{kind} {files[0].name}"), FileLock(f"{folder}.lock"):
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    build(temporary)
    wait_for_path(folder)
    return folder


def rows_from_main_process(path: Path, make: Callable[[], list[dict]]) -> list[dict]:
    """The rows of `make()`, called by the main process and shared with the others in `path`."""
    if is_main_process():
        path.unlink(missing_ok=True)
    wait_for_everyone()  # so that nobody reads the file of an earlier run
    if is_main_process():
        write_jsonl(path, make())
    wait_for_path(path)
    return read_jsonl(path)
