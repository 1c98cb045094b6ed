"""Atomic writing, digests, caches and disk space: a reader or a crash never meets half a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from core.errors import ConfigError
from core.runtime import is_main_process, logger, wait_for_everyone
from core.screen import busy

# ---- digests and disk space ----------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str:
    """What is wrong with the checkpoint in `folder`, by its manifest of digests; "" if intact."""
    try:
        manifest = Path(folder, "manifest.json").read_text(encoding="utf-8")
        digests = json.loads(manifest)
        damaged = [name for name in digests if file_digest(folder / name) != digests[name]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "manifest.json is damaged"
    if damaged:
        return f"{', '.join(damaged)} is damaged"
    if not digests:
        return "manifest.json is empty"
    return ""


def check_disk_space(folder: str, needed: float) -> None:
    """Raise ConfigError if the disk of `folder` has less than `needed` bytes free."""
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


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `folder` if the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Yield a text file that replaces `path` at the end, once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_writer(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=number_or_text)
            file.write(line + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line."""
    # Lines of bytes: splitting text would also split inside a value, at U+2028.
    lines = path.read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def number_or_text(value: Any) -> float | str:
    """A number of NumPy or PyTorch as a float, anything else that JSON does not know as text."""
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


# ---- results of one process that all of them read ------------------------------------------------
#
# The others wait for the file to appear: a barrier of torch.distributed would time out while one
# process converts a model or asks a server for an hour.


def wait_for_path(path: Path) -> None:
    """Return once another process has created `path`."""
    while not path.exists():
        time.sleep(1)


def cached_folder(
    kind: str, files: Sequence[Path], build: Callable[[Path], None] | None, how: str = ""
) -> Path | None:
    """The cached folder for the content of `files`; `build(folder)` fills it the first time.

    `how` names what else the result depends on, `kind` what is done, for the log. Without `build`
    the result is None where there is no such folder yet.
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
    # One process of each machine builds.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with busy(f"{kind} {files[0].name}"), atomic_folder(folder) as temporary:
            build(temporary)
    wait_for_path(folder)
    return folder


def rows_from_main_process(path: Path, make: Callable[[], list[dict]]) -> list[dict]:
    """The rows of `make()`, which the main process calls; they are written to `path` for all."""
    if is_main_process():
        path.unlink(missing_ok=True)
    wait_for_everyone()  # nobody may read the file of an earlier run
    if is_main_process():
        write_jsonl(path, make())
    wait_for_path(path)
    return read_jsonl(path)
