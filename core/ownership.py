"""Ownership of output folders and their files.

Only one run at a time works in a folder: it holds OUT/.lock, and OUT/.running.json names its
process. A run replaces and deletes only files that runs have written: .files.json in each model
folder lists these files, and OUT/fingerprint.json marks the folder of a run. All other files are
left alone; a run that would overwrite one is refused before it trains.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.digests import existing_path
from core.errors import ConfigError, as_config_error
from core.files import has_weights, remove_unfinished, unfinished_name, write_json
from core.runtime import is_main_process, logger

RECORD = ".files.json"
# Files that saving a model and its tokenizer writes. In folders from before .files.json was
# introduced, these are the only files of ours.
SAVED_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
)
# Other files that a run writes, overwrites, or could mistake for its own weights. Logs are not
# listed, because they are only appended to.
RUN_FILES = (
    "*.safetensors",
    "stage.json",
    "stage_config.yaml",
    "fingerprint.json",
    "metrics.jsonl",
    "samples.jsonl",
    "calls*.jsonl",
    "requests*.jsonl",
    "preferences_*.jsonl",
    "rationales.jsonl",
    "win_rate.jsonl",
    "adapter",
    "checkpoints",
)
# Those that belong to one result, and are moved away with it.
OF_A_RESULT = (
    "stage_config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "adapter",
    "checkpoints",
)

# ---- one run in a folder -------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder during the block. Raises ConfigError if another run has it.

    The operating system releases the lock when the process ends, however it ends.
    """
    if not is_main_process():
        yield
        return
    with as_config_error(f"output_dir={folder} cannot be written to", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # One lock object per folder, so that nested blocks of one process share the lock.
        lock = FileLock(folder / ".lock", is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"output_dir={folder} is in use by {describe_holder(folder)}; wait until that "
                "run ends, or choose another output_dir"
            ) from None
    holder = folder / ".running.json"
    try:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if lock.lock_counter == 1:
            holder.unlink(missing_ok=True)
        lock.release()


def describe_holder(folder: Path) -> str:
    """The process that holds a folder, as far as it is known."""
    try:
        holder = json.loads((folder / ".running.json").read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # the run is just starting or ending
        return "another run"


# ---- the files of a folder -----------------------------------------------------------------------


def recorded_files(folder: Path) -> list[str]:
    """Names, relative to `folder`, of the model files that runs have written there."""
    record = folder / RECORD
    if record.exists():
        try:
            names = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            names = []
        return [str(name) for name in names if isinstance(names, list)]
    if not (folder / "fingerprint.json").exists():
        return []
    names = []
    for pattern in SAVED_FILES:
        names += [file.name for file in folder.glob(pattern) if file.is_file()]
    return names


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. Its files are moved into `folder` if the block ends without an
    error."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    unfinished = unfinished_name(folder / "saving")
    unfinished.mkdir()
    try:
        yield unfinished
        publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(unfinished: Path, folder: Path) -> None:
    """Move the files of the folder `unfinished` into `folder`, each atomically and synced to disk.
    Previously published files are removed, other files stay."""
    before = set(recorded_files(folder))
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    # The file that marks a complete folder comes last, if it is among them.
    files.sort(key=is_mark)
    names = [file.relative_to(unfinished).as_posix() for file in files]
    # Record the names first, so that after a crash these files are known to be ours.
    write_json(folder / RECORD, sorted(before | set(names)))
    remove_files(folder, (before - set(names)) | {name for name in before if is_mark(Path(name))})
    for file, name in zip(files, names, strict=True):
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in before and os.path.lexists(target):
            set_aside(target, name, "no run made it")
        file.replace(target)
    write_json(folder / RECORD, names)


def is_mark(file: Path) -> bool:
    return file.name == "fingerprint.json"


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def remove_recorded(folder: Path) -> None:
    """Delete what was published in a folder, and the folder if it is then empty."""
    remove_files(folder, recorded_files(folder))
    (folder / RECORD).unlink(missing_ok=True)
    remove_empty(folder)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Delete the named files of a folder, and subfolders that are then empty."""
    for name in names:
        # A record may be damaged or come from elsewhere: delete nothing outside the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        path = folder / name
        path.unlink(missing_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            remove_empty(folder / parent)


def remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def set_aside(path: Path, what: str, why: str) -> None:
    """Rename a file or folder to NAME.1, .2, ..., and log "moved `what` to NAME.1: `why`"."""
    moved = path.rename(first_free_name(path))
    logger.warning("moved %s to %s: %s", what, moved, why)


def first_free_name(path: Path) -> Path:
    """The first of NAME.1, NAME.2, ... that does not exist."""
    number = 1
    while os.path.lexists(f"{path}.{number}"):
        number += 1
    return Path(f"{path}.{number}")


def lay_aside_result(folder: Path, artifacts: Iterable[str], why: str) -> None:
    """Move the finished result in `folder` to previous.1, .2, ...: model, records and `artifacts`.

    Paid answers stay, and so do the logs, which the next run appends to.
    """
    names = recorded_files(folder)
    for path in artifacts:
        if Path(path).parent == folder:
            names.append(Path(path).name)
    # The stage's record is last: after a crash in between, the next run moves the rest.
    names += [*OF_A_RESULT, RECORD, "stage.json"]
    number = 1
    while (folder / f"previous.{number}" / "stage.json").exists():
        number += 1
    aside = folder / f"previous.{number}"
    aside.mkdir(exist_ok=True)
    # Copied, not moved: the folder stays marked as that of a run all the time.
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(folder / "fingerprint.json", aside)
    move_files(folder, names, aside)
    logger.warning(
        "the finished result in %s was moved to %s: %s; --force=true would overwrite it",
        folder,
        aside.name,
        why,
    )


def lay_aside_model(folder: Path) -> None:
    """Move the model that was published in `folder`, if there is one, to FOLDER.1, .2, ..."""
    if not has_weights(folder):
        return
    names = set(recorded_files(folder)) - {"fingerprint.json"}
    # Weights last: as long as one is here, the next run moves the rest after a crash.
    in_order = sorted(names, key=is_weights)
    aside = first_free_name(folder)
    move_files(folder, [*in_order, RECORD, "fingerprint.json"], aside)
    logger.warning(
        "the model in %s was moved to %s: another one takes its place; --force=true would "
        "overwrite it",
        folder,
        aside,
    )


def move_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Move the named files and folders that exist in `folder` to the folder `target`."""
    for name in names:
        if not os.path.lexists(folder / name):
            continue
        moved = target / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(moved)


# ---- foreign files -------------------------------------------------------------------------------


def refuse_foreign_files(
    folder: Path, patterns: Sequence[str] = (*SAVED_FILES, *RUN_FILES)
) -> None:
    """Raise ConfigError if a run would overwrite files in `folder` that match the patterns and that
    no run made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder}: it is not a folder; choose another output_dir")
    if (folder / "fingerprint.json").is_file() or (folder / RECORD).is_file():
        return
    foreign = [path.name for path in sorted(folder.glob("*")) if matches_any(path.name, patterns)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConfigError(
            f"output_dir={folder} has files that no run made and that this one would overwrite "
            f"({shown}); choose another output_dir, or move them away"
        )


def refuse_own_inputs(config: Any, names: Sequence[str] = ()) -> None:
    """Raise ConfigError if an option names an input that the run would overwrite: output_dir
    itself, or a file or folder in it with a name that runs write or that is in `names`.
    """
    folder = Path(config.output_dir).resolve()
    for option, value in vars(config).items():
        if option in ("output_dir", "resume_from_checkpoint") or not isinstance(value, str):
            continue
        existing = existing_path(value)
        if existing is None or not existing.resolve().is_relative_to(folder):
            continue
        parts = existing.resolve().relative_to(folder).parts
        if not parts or matches_any(parts[0], (*SAVED_FILES, *RUN_FILES, *names)):
            raise ConfigError(
                f"{option}={value} is inside output_dir={config.output_dir}, where the run writes; "
                "choose another output_dir"
            )


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
