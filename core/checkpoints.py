"""Sealed checkpoints, resumption, and the fingerprints that decide whether a finished stage is reused."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping

from core.config import StageConfig, TrainingConfig
from core.errors import ConfigError
from core.files import file_digest, find_damage, write_json
from core.runtime import logger

# Options that do not change what comes out of a stage: with others, a run goes on from the same checkpoints.
NOT_FINGERPRINTED = frozenset(
    """stage_name output_dir enabled save_intermediate log_level report_to use_wandb wandb_project
    wandb_run_name resume_from_checkpoint save_steps save_freq save_total_limit use_auth_token max_calls max_cost
    input_price output_price call_timeout max_missing""".split()
)


def fingerprinted_options(config: StageConfig) -> dict[str, Any]:
    """The options that decide what comes out of a stage, as JSON gives them back."""
    options = {
        name: value for name, value in asdict(config).items() if name not in NOT_FINGERPRINTED
    }
    return json.loads(json.dumps(options, default=str))


def file_identity(path: Path) -> Any:
    """What tells whether a file or the folder of a model is still the same one; None for what is not there."""
    path = path.expanduser()
    kinds = (
        "*.safetensors",
        "*config.json",
        "tokenizer*",
        "chat_template*",
        "vocab*",
        "*.model",
    )  # not its records
    files = (
        sorted(file for kind in kinds for file in path.glob(kind))
        if path.is_dir()
        else [path] * path.is_file()
    )
    if path.is_file() and path.stat().st_size < 2**24:
        return file_digest(path)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files] or None


digest_when_imported = functools.cache(
    lambda module: file_digest(Path(module.__file__))
)  # as it was when it was first asked for


def describe_differences(old: Mapping, new: Mapping) -> str:
    """What is not the same in two fingerprints, in words; empty if all is."""
    said = []
    for part in new:
        if isinstance(new[part], dict):
            both = {
                key: (old[part].get(key), new[part].get(key))
                for key in sorted({**old[part], **new[part]})
            }
            said += [
                f"{key} {before!r} -> {now!r}" if part == "options" else f"{key} changed"
                for key, (before, now) in both.items()
                if before != now
            ]
        elif (before := old.get(part)) != new[part]:
            said.append(
                {
                    "data": "its data changed",
                    "start": "a stage before it changed",
                    "launch": f"processes {before} -> {new[part]}",
                }[part]
            )
    return "; ".join(said)


def seal_checkpoint(folder: Path, config: TrainingConfig) -> None:
    """Write down whose checkpoint it is and, last of all, the hashes of its files, once they lie on the disk."""
    write_json(folder / "options.json", fingerprinted_options(config))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    write_json(
        folder / "manifest.json",
        {file.relative_to(folder).as_posix(): file_digest(file) for file in files},
    )


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to go on from, as resume_from_checkpoint says. A broken one is named and passed over."""
    if isinstance(named := config.resume_from_checkpoint, str):
        if (
            json.loads(Path(named, "options.json").read_text(encoding="utf-8")).keys()
            != fingerprinted_options(config).keys()
        ):
            raise ConfigError(f"resume_from_checkpoint={named} is of another recipe")
        return Path(named)
    found = (
        Path(config.output_dir, "checkpoints").glob("[a-z]*-*")
        if config.resume_from_checkpoint
        else ()
    )
    for folder in sorted(found, key=lambda folder: -int(folder.name.rpartition("-")[2])):
        if not (wrong := find_damage(folder)):
            theirs, ours = (
                json.loads((folder / "options.json").read_text(encoding="utf-8")),
                fingerprinted_options(config),
            )
            if changed := describe_differences({"options": theirs}, {"options": ours}):
                raise ConfigError(
                    f"{folder} is of a run with other options ({changed}); take another output_dir, or "
                    "resume_from_checkpoint=False to start anew"
                )
            logger.info("going on from %s", folder)
            return folder
        logger.warning("%s is passed over: %s", folder, wrong)
    return None
