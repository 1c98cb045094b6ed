"""The folder of a run: sealed checkpoints, the claim on the folder, the record of a finished stage.

core/train_state.py writes the contents of a checkpoint; this file seals, finds and verifies it.
OUT/fingerprint.json says which run the folder and its checkpoints belong to. OUT/stage.json is
written last: a stage is finished when its stage.json says so.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.command import started_by
from core.config import StageConfig, TrainingConfig
from core.digests import find_changed_files, folder_digests
from core.errors import ConfigError, as_config_error
from core.files import (
    file_digest,
    find_damage,
    has_weights,
    remove_unfinished,
    sealed_files,
    write_json,
)
from core.fingerprints import (
    EVALUATION_OPTIONS,
    NOT_FINGERPRINTED,
    describe_changed_keys,
    describe_differences,
    evaluation_options,
    fingerprinted_options,
)
from core.ownership import (
    lay_aside_result,
    recorded_files,
    remove_empty,
    remove_files,
    set_aside,
)
from core.runtime import default_device, is_main_process, is_sharded, logger, wait_for_everyone
from core.yaml_files import dump_yaml

# With different versions of these, the same options may give different weights.
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- what is compared besides the fingerprint -----------------------------------------------------


def circumstances(config: StageConfig) -> dict[str, Any]:
    """What may differ between equal fingerprints: {"versions": of the libraries, "evaluation":
    options that only affect metrics}."""
    versions = {"python": sys.version.split()[0]}
    versions |= {name: version(name) for name in (*LIBRARIES, "datasets")}
    return {"versions": versions, "evaluation": evaluation_options(config)}


def log_circumstances(what: str, recorded: Mapping, config: StageConfig) -> None:
    """Warn if `what`, a stage or a checkpoint, was made with other versions of the libraries; log
    which evaluation options had other values."""
    now = circumstances(config)
    before = recorded.get("versions") or {}
    changed = []
    for name in LIBRARIES:
        # Checkpoints in an older format have no versions.
        if name in before and before[name] != now["versions"][name]:
            changed.append(f"{name} {before[name]}, here {now['versions'][name]}")
    if changed:
        logger.warning(
            "%s was made with %s: a run from the start may give other weights",
            what,
            ", ".join(changed),
        )
    differences = describe_changed_keys(
        "options", recorded.get("evaluation") or {}, now["evaluation"]
    )
    if differences:
        logger.info(
            "the results in %s were measured with other options: %s", what, "; ".join(differences)
        )


# -- checkpoints ----------------------------------------------------------------------------------


def seal_checkpoint(folder: Path, config: TrainingConfig) -> None:
    """Make a checkpoint verifiable: add its options and, when all files are on disk, a manifest of
    their hashes."""
    write_json(folder / "options.json", fingerprinted_options(config))
    write_json(folder / "circumstances.json", circumstances(config))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    # Without fsync, a power failure could leave a file shorter than its hash in the manifest says.
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    manifest = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
    write_json(folder / "manifest.json", manifest)


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` selects: none, the one it names, or the newest
    intact one in output_dir. Corrupt checkpoints are reported and skipped.

    Raises ConfigError if the checkpoint belongs to a run with other options.
    """
    resume = config.resume_from_checkpoint
    if isinstance(resume, str):
        return check_named_checkpoint(Path(resume), config)
    if not resume:
        return None
    for folder in newest_first(Path(config.output_dir, "checkpoints")):
        damage = find_damage(folder)
        if damage:
            logger.warning("%s is skipped: %s", folder, damage)
            continue
        if not is_of_recipe(folder, config):
            logger.warning("%s is skipped: it belongs to another recipe or version", folder)
            continue
        refuse_other_options(folder, config)
        logger.info("resuming from %s", folder)
        return folder
    return None


def newest_first(checkpoints: Path) -> list[Path]:
    """The folders checkpoint-N in `checkpoints`, largest N first. Other names, such as a copy of a
    checkpoint or one being written, are ignored."""
    named = [
        path
        for path in checkpoints.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-[0-9]+", path.name)
    ]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def check_named_checkpoint(folder: Path, config: TrainingConfig) -> Path:
    """Return `folder` if it is a checkpoint of the same recipe; option values may differ. Raises
    ConfigError otherwise."""
    if not is_of_recipe(folder, config):
        raise ConfigError(
            f"resume_from_checkpoint={folder} belongs to another recipe; give one of this recipe"
        )
    compare_circumstances(folder, config)
    return folder


def is_of_recipe(checkpoint: Path, config: TrainingConfig) -> bool:
    """Whether a checkpoint belongs to this config's recipe, in its current version."""
    # Recipes differ in the names of their options, so these identify the recipe.
    options = read_json(checkpoint / "options.json")
    names = {option.name for option in fields(config)}
    not_compared = NOT_FINGERPRINTED | EVALUATION_OPTIONS.keys()
    return options.keys() - not_compared == names - not_compared


def refuse_other_options(checkpoint: Path, config: TrainingConfig) -> None:
    """Raise ConfigError if a checkpoint was trained with other options than `config` has."""
    before = {"options": read_json(checkpoint / "options.json")}
    now = {"options": fingerprinted_options(config)}
    changes = describe_differences(before, now)
    if changes:
        raise ConfigError(
            f"{checkpoint} comes from a run with other options ({changes}); choose another "
            "output_dir, or start over with resume_from_checkpoint=False"
        )
    compare_circumstances(checkpoint, config)


def compare_circumstances(checkpoint: Path, config: TrainingConfig) -> None:
    """`log_circumstances` for a checkpoint, unless it is in an older format without them."""
    file = checkpoint / "circumstances.json"
    if file.exists():
        log_circumstances(str(checkpoint), read_json(file), config)


def remove_end_checkpoint(config: StageConfig, metrics: Mapping[str, float]) -> None:
    """Remove the checkpoint of the last step if it has no optimizer state: it was a safeguard until
    the stage is recorded."""
    checkpoints = Path(config.output_dir, "checkpoints")
    end = checkpoints / f"checkpoint-{metrics.get('steps')}"
    if not end.exists() or (end / "optimizer.safetensors").exists():
        return
    remove_checkpoint(end)
    remove_empty(checkpoints)


def remove_checkpoint(folder: Path) -> None:
    """Delete the files that a checkpoint's manifest names, and the folder if it is then empty."""
    remove_files(folder, [*sealed_files(folder), "manifest.json"])
    remove_empty(folder)


# -- the claim on a folder ------------------------------------------------------------------------


def claim_run_folder(config: StageConfig, fingerprint: Mapping) -> None:
    """Claim output_dir for the run with this fingerprint. The caller holds the folder's lock.

    The finished result of another run is moved to previous.1, .2, ..., or overwritten with `force`.
    Checkpoints of another run, or all of them with resume_from_checkpoint=false, are moved to
    checkpoints.1, .2, ... If resume_from_checkpoint is a path, all checkpoints stay.
    """
    folder = Path(config.output_dir)
    resume = vars(config).get("resume_from_checkpoint")
    # With another number of processes, each would get other rows and read other files.
    processes = os.environ.get("WORLD_SIZE", 1)
    launch = f"{processes} sharded" if is_sharded() else f"{processes}"
    claim = {**fingerprint, "launch": launch}
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if not config.force:
            keep_finished_result(folder, fingerprint)
        # From here on the stage is unfinished, until it writes a new record.
        (folder / "stage.json").unlink(missing_ok=True)
        why = find_reason_to_set_aside(folder, claim, resume)
        if why:
            set_aside(folder / "checkpoints", "the checkpoints of an earlier run", why)
        write_json(folder / "fingerprint.json", claim)
    wait_for_everyone()


def keep_finished_result(folder: Path, fingerprint: Mapping) -> None:
    """Move a finished result with another fingerprint out of the way. If the fingerprint is the
    same, move only files that changed since they were saved."""
    if not (folder / "stage.json").exists():
        return
    finished = read_stage_record(folder)
    differences = describe_differences(finished["fingerprint"], fingerprint)
    if differences:
        lay_aside_result(folder, finished["artifacts"].values(), differences)
        return
    for name in find_changed_files(folder, finished.get("files") or {}):
        if (folder / name).exists():
            set_aside(folder / name, name, "it is not the file that was saved")


def find_reason_to_set_aside(folder: Path, claim: Mapping, resume: bool | str | None) -> str:
    """Why the checkpoints in `folder` do not belong to the run with this claim; empty if they do,
    or if there are none."""
    if not (folder / "checkpoints").exists():
        return ""
    if resume is False:
        return "resume_from_checkpoint=false"
    record = folder / "fingerprint.json"
    # A named checkpoint may be in this folder but from another run; then that is intended.
    if resume is not True or not record.exists():
        return ""
    with as_config_error(f"{record} cannot be read; move {folder / 'checkpoints'} away"):
        return describe_differences(read_json(record), claim)


# -- the record of a finished stage ---------------------------------------------------------------


def find_reason_to_run(folder: Path, fingerprint: Mapping) -> str:
    """Why a stage has to run; empty if `folder` has its result with this fingerprint, and the files
    are unchanged since they were saved."""
    record = folder / "stage.json"
    if not record.exists():
        return "it is not finished"
    with as_config_error(f"{record} cannot be read; delete it to run the stage again"):
        finished = read_json(record)
        differences = describe_differences(finished["fingerprint"], fingerprint)
        # A record in an older format lists no files.
        saved_files = dict(finished.get("files") or {})
    changes = find_changed_files(folder, saved_files)
    return differences or ", ".join(f"{name} {change}" for name, change in changes.items())


def read_finished_stage(config: StageConfig) -> dict[str, Any]:
    """The record of a finished stage whose result is reused. Logs differences that do not change
    the fingerprint."""
    folder = Path(config.output_dir)
    record = read_stage_record(folder)
    log_circumstances(str(folder), record, config)
    return record


def read_stage_record(folder: Path) -> dict[str, Any]:
    """The stage.json of a finished stage, with paths corrected if the folder was moved."""
    record = read_json(folder / "stage.json")
    written_as = record["output_dir"]
    if record["model_path"]:
        record["model_path"] = relocate(record["model_path"], written_as, folder)
    for name, path in record["artifacts"].items():
        record["artifacts"][name] = relocate(path, written_as, folder)
    return record


def relocate(path: str, old_folder: str, folder: Path) -> str:
    """`path` after `old_folder` moved to `folder`, if it was inside it or in a sibling folder."""
    # "../.." leads out of the chain's folder, which moves as a whole.
    relative = Path(os.path.relpath(path, old_folder))
    is_elsewhere = relative.parts[:2] == ("..", "..")
    if is_elsewhere or str(folder) == old_folder:
        return path
    return os.path.normpath(folder / relative)


def find_model_of_chain(name: str) -> str:
    """The model folder of the chain in the folder `name`: OUT/final, or the model of the last
    finished stage if the chain is unfinished. Any other `name` is returned unchanged. Raises
    ConfigError."""
    folder = Path(name).expanduser()
    if not (folder / "pipeline.json").is_file():
        return name
    paths = []
    with as_config_error(f"the chain in {name} cannot be read"):
        chain = read_json(folder / "pipeline.json")
        if chain["state"].get("finished"):
            paths.append(str(folder / "final"))
        enabled = [stage for stage, options in chain["plan"].items() if options["enabled"]]
        # An unfinished run has results of its first stages only.
        for stage, result in reversed([*zip(enabled, chain["results"], strict=False)]):
            if result["success"]:
                paths.append(read_stage_record(folder / stage)["model_path"])
    for path in paths:
        if has_weights(path):
            return path
    raise ConfigError(f"the chain in {name} has no model yet; run it to the end of a stage")


def saved_digests(folder: Path) -> dict[str, str]:
    """{name: digest} of the model files that runs have saved in a folder. Foreign files are not
    part of the model: they may change."""
    saved = recorded_files(folder)
    return {name: digest for name, digest in folder_digests(folder).items() if name in saved}


def write_stage_record(config: StageConfig, result: Any, lineage: Mapping[str, Any]) -> None:
    """Write stage_config.yaml, the resolved options, and finally stage.json.

    `result` is a StageResult; `lineage` says what the stage started from, with its fingerprint. The
    command is that of the process that finishes the stage; for a resumed run, the last one.
    """
    if not is_main_process():
        return
    folder = Path(config.output_dir)
    options = dump_yaml(asdict(config))
    (folder / "stage_config.yaml").write_text(options, encoding="utf-8")
    # Where the stage saved its results: its model, or artifacts beside a model passed on unchanged.
    own_folders = [Path(path) for path in (result.model_path, *result.artifacts.values()) if path]
    # In the order in which one reads it: what, from what, with which result, where.
    record = {
        "stage": result.stage_name,
        "output_dir": str(folder),
        "command": started_by(),
        "success": result.success,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **lineage,
        "model_path": result.model_path,
        "metrics": result.metrics,
        "artifacts": result.artifacts,
        "files": saved_digests(folder) if folder in own_folders else {},
        "device": str(default_device()),
        **circumstances(config),
    }
    write_json(folder / "stage.json", record)
    remove_end_checkpoint(config, result.metrics)
