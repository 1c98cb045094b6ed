"""Fingerprints: what decides the result of a stage, so that a finished stage can be reused.

A fingerprint has five parts: the options, the data, the files and models that the options name,
the code, and, in a chain, the stages before. It is recorded in stage.json and compared with that
of the next run. The result is the trained weights, and for evaluate its figures.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config import StageConfig
from core.data_sources import split_paths
from core.digests import existing_path, file_identity
from core.source_code import (
    CODE_FOLDERS,
    ROOT,
    find_code,
    find_code_of_file,
    named_digests,
    shown_name,
    source_digest,
)

FORM = 2  # format version of fingerprints; different versions are not compared part by part

# -- options that change no result -----------------------------------------------------------------
#
# Changing these keeps a finished stage finished and its checkpoints valid. Every other option is
# part of the fingerprint.

NOT_FINGERPRINTED = frozenset(
    {
        # names, folders and logging
        "stage_name",
        "output_dir",
        "enabled",
        "save_intermediate",
        "force",
        "log_level",
        "logging_steps",
        "report_to",
        "use_wandb",
        "wandb_project",
        "wandb_run_name",
        # keys
        "use_auth_token",
        "teacher_api_key",
        "feedback_api_key",
        # checkpoints; the one of the best evaluation is saved and kept in any case
        "resume_from_checkpoint",
        "save_steps",
        "save_freq",
        "save_total_limit",
        # limits on the calls of a judge or a teacher
        "max_calls",
        "max_cost",
        "input_price",
        "output_price",
        "call_timeout",
        "max_missing",
        # it only refuses data, or has no effect at all
        "auto_detect_format",
        "load_best_model",
    }
)


def chooses_weights(options: Mapping[str, Any]) -> bool:
    """Whether evaluations decide which weights are kept or when training ends."""
    return bool(options.get("load_best_model_at_end") or options.get("early_stopping_patience"))


def batches_matter(options: Mapping[str, Any]) -> bool:
    """Whether the size of evaluation batches changes the training, by rounding."""
    return chooses_weights(options) or bool(options.get("precompute_ref_log_probs"))


def writes_questions(options: Mapping[str, Any]) -> bool:
    """Whether a teacher writes questions, which must differ from those of an evaluation."""
    return bool(options.get("generate_synthetic_data"))


def gives_figures(options: Mapping[str, Any]) -> bool:
    """Whether metrics are the result, as in evaluate, the only recipe with a baseline."""
    return "baseline" in options


def answers_matter(options: Mapping[str, Any]) -> bool:
    """Whether answers of up to max_new_tokens are the result, or are trained on."""
    learns_own_answers = options.get("distillation_type", "response") != "response"
    return gives_figures(options) or (learns_own_answers and bool(options.get("on_policy_share")))


def never(options: Mapping[str, Any]) -> bool:
    return False


# Options of evaluation -> whether the result depends on them nevertheless. An option that a custom
# stage defines is part of the fingerprint, because its meaning there is unknown.
EVALUATION_OPTIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "eval_steps": chooses_weights,
    "metric_for_best_model": chooses_weights,
    "greater_is_better": chooses_weights,
    "per_device_eval_batch_size": batches_matter,
    "eval_freq": never,
    "num_eval_prompts": never,
    "num_eval_samples": gives_figures,
    "max_new_tokens": answers_matter,
    "eval_reasoning_tasks": writes_questions,
}

# Options of rlaif that contain options of other recipes.
OPTIONS_OF_PARTS = ("rl_kwargs", "reward_kwargs", "preference_kwargs")


def fingerprinted_options(config: StageConfig) -> dict[str, Any]:
    """The options that decide the result of a stage, as loaded back from JSON."""
    options = json_options(config)
    kept = {}
    for name, value in options.items():
        is_own = name in EVALUATION_OPTIONS and is_defined_elsewhere(type(config), name)
        if is_own or matters(name, options):
            kept[name] = value
    for name in OPTIONS_OF_PARTS:
        part = kept.get(name)
        if isinstance(part, dict):
            kept[name] = {option: part[option] for option in part if matters(option, part)}
    return kept


def json_options(config: StageConfig) -> dict[str, Any]:
    """All options after a round trip through JSON, which changes tuples to lists, so that both
    sides of a comparison have the same types."""
    return json.loads(json.dumps(asdict(config), default=str))


def matters(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the result depends on an option, given the values of all options."""
    if name in EVALUATION_OPTIONS:
        return EVALUATION_OPTIONS[name](options)
    return name not in NOT_FINGERPRINTED


def is_defined_elsewhere(config_class: type, name: str) -> bool:
    """Whether an option is defined by a custom stage outside the repository."""
    for owner in config_class.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            file = getattr(sys.modules.get(owner.__module__), "__file__", None)
            return file is None or Path(file).resolve().parent not in CODE_FOLDERS
    return False


def evaluation_options(config: StageConfig) -> dict[str, Any]:
    """The evaluation options that are not in the fingerprint: only metrics depend on them."""
    options = json_options(config)
    left_out = options.keys() - fingerprinted_options(config).keys()
    return {name: options[name] for name in EVALUATION_OPTIONS if name in left_out}


# -- files ----------------------------------------------------------------------------------------


def identify_named_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """{text: identity} for every option that is the path of a file or folder.

    The path of a function is written file.py:name; its identity includes the modules that the file
    imports.
    """
    identities = {}
    for text in texts_in(list(options.values())):
        path = existing_path(re.sub(r"(\.py):\w+$", r"\1", text))
        if path is None:
            continue
        identity = identify_code(path) if path.suffix == ".py" else file_identity(path)
        if identity:
            identities[text] = identity
    return identities


def identify_code(path: Path) -> dict[str, str]:
    """{file: digest} of a user's Python file and of what it imports from its folder or the
    repository."""
    return named_digests(find_code_of_file(path).values(), path.resolve().parent)


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in an option's value: several data sets are a list of texts and mappings, or
    one text with commas."""
    if isinstance(value, str):
        yield value
        if "," in value:
            yield from split_paths(value)
    elif isinstance(value, Mapping):
        yield from texts_in(list(value.values()))
    elif isinstance(value, list):
        for entry in value:
            yield from texts_in(entry)


# -- code ----------------------------------------------------------------------------------------


def function_sources(stage_class: type) -> dict[str, str]:
    """{name: source} of a class's own functions; empty at a Python prompt, which keeps none."""
    sources = {}
    with contextlib.suppress(OSError):
        for name, member in vars(stage_class).items():
            if inspect.isfunction(member):
                sources[name] = inspect.getsource(member)
    return sources


def modules_of_notebook_class(stage_class: type, sources: Mapping[str, str]) -> list[str]:
    """The modules used by a class without a file: those of its bases and of names in its code."""
    home = sys.modules[stage_class.__module__]
    modules = [parent.__module__ for parent in stage_class.__mro__]
    # Not all globals of a notebook: an unrelated cell must not change the fingerprint.
    for word in re.findall(r"\w+", " ".join(sources.values())):
        value = vars(home).get(word)
        if inspect.ismodule(value):
            modules.append(value.__name__)
        elif inspect.isclass(value) or inspect.isfunction(value):
            modules.append(value.__module__)
    return modules


@functools.cache
def digest_when_imported(module: ModuleType) -> str:
    """The digest of a module's file at the time of the first call.

    Python keeps running the code that it imported, whatever happens to the file afterwards.
    """
    return source_digest(Path(module.__file__).read_bytes())


def fingerprint_code(stage_class: type) -> tuple[dict[str, str], list[str]]:
    """({file: digest} of a stage's code, [files that changed since Python imported them]).

    The code is the file of the stage's class and what it imports, followed through the repository's
    files and those in its own folder. A class defined in a notebook has no file: its functions are
    digested one by one.
    """
    home = sys.modules[stage_class.__module__]
    home_file = vars(home).get("__file__")
    digests = {}
    if home_file:
        names = [home.__name__]
        home_folder = Path(home_file).resolve().parent
    else:
        sources = function_sources(stage_class)
        names = modules_of_notebook_class(stage_class, sources)
        home_folder = ROOT
        for name, source in sources.items():
            digests[f"{name}()"] = source_digest(textwrap.dedent(source).encode())

    files = find_code(names, home_folder)
    digests |= named_digests(files.values(), home_folder)
    changed = set()
    for name, path in files.items():
        module = sys.modules.get(name)
        shown = shown_name(path, home_folder)
        if module is not None and digest_when_imported(module) != digests[shown]:
            changed.add(shown)
    return dict(sorted(digests.items())), sorted(changed)


# -- the whole ------------------------------------------------------------------------------------


def compute_fingerprint(
    config: StageConfig, stage_class: type, data_digest: str | None, start: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(fingerprint, [code files that changed since Python imported them]) of a stage.

    `data_digest` is the hash of its rows, `start` that of the stages before it in a chain; either
    may be None.
    """
    options = fingerprinted_options(config)
    code, changed = fingerprint_code(stage_class)
    fingerprint = {
        "form": FORM,
        "options": options,
        "data": data_digest,
        "start": start,
        "files": identify_named_files(options),
        "code": code,
    }
    return fingerprint, changed


def describe_differences(old: Mapping, new: Mapping) -> str:
    """What differs between two fingerprints, as text for the log; empty if nothing does."""
    differences = []
    is_comparable = old.get("form") == new.get("form")
    if not is_comparable:
        differences.append("an older version recorded its files and code in another format")
    for part, now in new.items():
        before = old.get(part)
        # In another format, files and code differ in any case.
        if before == now or (not is_comparable and part != "options"):
            continue
        if isinstance(now, dict):
            differences += describe_changed_keys(part, before or {}, now)
        elif part == "data":
            differences.append("its data changed")
        elif part == "start":
            differences.append("an earlier stage changed")
        else:
            differences.append(f"processes {before} -> {now}")
    return "; ".join(differences)


def describe_changed_keys(part: str, old: Mapping, new: Mapping) -> list[str]:
    """One phrase per key whose value differs; values are shown for options only."""
    keys = {*old, *new}
    if part == "options":
        # If an evaluation option is on one side only, the option that makes it matter differs too.
        keys -= (old.keys() ^ new.keys()) & (NOT_FINGERPRINTED | EVALUATION_OPTIONS.keys())
    phrases = []
    for key in sorted(keys):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        phrases.append(f"{key} {before!r} -> {now!r}" if part == "options" else f"{key} changed")
    return phrases
