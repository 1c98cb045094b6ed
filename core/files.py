"""Atomic writing, digests, caches and disk space: a reader or a crash never meets half a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from core.errors import ConfigError
from core.runtime import is_main_process, logger, wait_for_everyone


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_disk_space(folder: str, needed: float) -> None:
    """Refuse a run for which the disk has no room; raises ConfigError."""
    there = next(
        path
        for path in (Path(folder).absolute(), *Path(folder).absolute().parents)
        if path.exists()
    )
    if (free := shutil.disk_usage(there).free) < needed:
        raise ConfigError(
            f"output_dir={folder}: the disk has {free / 1e9:.1f} GB left, and about {needed / 1e9:.1f} "
            "GB will be written; make room, save fewer checkpoints, or take another disk"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A folder beside `folder` that takes its place when the block ends without an error."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cached_folder(
    kind: str, files: Sequence[Path], build: Callable[[Path], None] | None, how: str = ""
) -> Path | None:
    """A folder that `build(folder)` fills once for the content of `files`; without `build` None where it is not."""
    content = hashlib.sha256(
        b"".join(bytes.fromhex(file_digest(file)) for file in files) + how.encode()
    ).hexdigest()
    folder = (
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        / "recipes"
        / kind
        / content[:32]
    )
    if not folder.exists():
        if build is None:
            return None
        logger.info(
            "%s %s once, kept in %s",
            kind,
            files[0].name,
            str(folder).replace(str(Path.home()), "~"),
        )
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            with atomic_folder(folder) as aside:
                build(aside)
        while not folder.exists():  # one process of a machine builds; a barrier would time out
            time.sleep(1)
    return folder


@contextlib.contextmanager
def atomic_writer(path: Path):
    """A text file, written aside, flushed and renamed: a reader, or a crash, meets the old one or the new one whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with atomic_writer(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    with atomic_writer(path) as file:
        number = lambda value: (
            float(value) if hasattr(value, "__float__") else str(value)
        )  # of NumPy or torch
        json.dump(value, file, indent=2, ensure_ascii=False, default=number)


def rows_from_main_process(path: Path, make: Callable[[], list[dict]]) -> list[dict]:
    """The rows that `make()` returns in the main process, kept at `path`; others wait for it: a barrier times out."""
    if is_main_process():
        path.unlink(missing_ok=True)
    wait_for_everyone()  # till an older run's file is gone
    if is_main_process():
        write_jsonl(path, make())
    while not path.exists():
        time.sleep(1)
    return [
        json.loads(line) for line in path.read_bytes().splitlines()
    ]  # of a text it would split at U+2028 too


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        broken = [name for name, known in files.items() if file_digest(folder / name) != known]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "manifest.json is damaged"
    return (
        f"{', '.join(broken)} is damaged" if broken else "" if files else "manifest.json is empty"
    )
