"""Fingerprints: what decides the result of a stage, so that a finished stage can be reused.

A fingerprint has five parts: the options, the data, the files and models that the options name,
the code, and, in a chain, the stages before. It is recorded in stage.json and compared with that
of the next run.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config import StageConfig
from core.data_sources import split_paths
from core.files import file_digest

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = (ROOT, ROOT / "core", ROOT / "recipes")

# Options that do not change what comes out of a stage: changing them keeps checkpoints valid.
NOT_FINGERPRINTED = frozenset(
    {
        # names, folders and logging
        "stage_name",
        "output_dir",
        "enabled",
        "save_intermediate",
        "force",
        "log_level",
        "report_to",
        "use_wandb",
        "wandb_project",
        "wandb_run_name",
        "use_auth_token",
        # checkpoints
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
    }
)

# What identifies the folder of a model; the records of the stage that made it are no part of it.
MODEL_FILES = (
    "*.safetensors",
    "*config.json",
    "tokenizer*",
    "chat_template*",
    "vocab*",
    "*.model",
)
MAX_BYTES_HASHED = 2**24  # larger files are identified by size and time of modification


# -- options and files ---------------------------------------------------------------------------


def fingerprinted_options(config: StageConfig) -> dict[str, Any]:
    """The options that decide what comes out of a stage, as JSON gives them back."""
    # What JSON changes, such as tuples into lists, has to be changed on both sides of a comparison.
    options = asdict(config)
    for name in NOT_FINGERPRINTED:
        options.pop(name, None)
    return json.loads(json.dumps(options, default=str))


def file_identity(path: Path) -> Any:
    """A JSON value that changes with the content of a file or of a model's folder.

    Small files are identified by their hash, large ones and folders by the sizes and times of
    modification. None if there is no such path.
    """
    path = path.expanduser()
    if path.is_file():
        if path.stat().st_size < MAX_BYTES_HASHED:
            return file_digest(path)
        files = [path]
    else:
        # For a folder of another kind, or none, there are no such files.
        files = []
        for pattern in MODEL_FILES:
            files += path.glob(pattern)
        files.sort()
    identity = []
    for file in files:
        status = file.stat()
        identity.append([file.name, status.st_size, status.st_mtime_ns])
    return identity or None


def identify_named_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """{text: identity} of every option that is the path of a file or a folder.

    The path of a function is written file.py:name.
    """
    identities = {}
    for text in texts_in(list(options.values())):
        # Longer texts are templates or prompts; the operating system would refuse them as a path.
        if not 0 < len(text) < 256:
            continue
        path = re.sub(r"(\.py):\w+$", r"\1", text)
        identity = file_identity(Path(path))
        if identity:
            identities[text] = identity
    return identities


def texts_in(value: Any) -> Iterator[str]:
    """The texts in an option's value: several data sets are a list of texts and of mappings, or one
    text with commas."""
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


@functools.cache
def imported_names(source: bytes, package: str) -> tuple[str, ...]:
    """The modules that a Python file of `package` imports, also inside its functions.

    In `from a import b`, b may be a module or a name in a: both a and a.b are listed.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        # The file is being edited while a run goes on; its changed digest is what counts.
        return ()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                module = f"{parent}.{module}".strip(".")
            names.append(module)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return tuple(names)


def find_source(name: str, home_folder: Path) -> Path | None:
    """The file of a module, if it is in a folder of the repository or in `home_folder`.

    A module that an import inside a function has not loaded yet is looked up by its name, so that
    a fingerprint does not depend on what ran before.
    """
    module = sys.modules.get(name)
    if module is None:
        relative = f"{Path(*name.split('.'))}.py"
        candidates = [ROOT / relative, home_folder / relative]
    else:
        file = getattr(module, "__file__", None)
        candidates = [Path(file)] if file else []
    for candidate in candidates:
        path = candidate.resolve()
        if path.parent in (*CODE_FOLDERS, home_folder) and path.is_file():
            return path
    return None


def find_code(names: Iterable[str], home_folder: Path) -> dict[str, Path]:
    """{module: file} of the modules `names` and of all that they import, directly or not."""
    files: dict[str, Path] = {}
    # Rooms import each other: without this set a module would be read once for each path to it.
    seen = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        path = find_source(name, home_folder)
        if path is None:
            continue
        files[name] = path
        package = getattr(sys.modules.get(name), "__package__", None) or name.rpartition(".")[0]
        queue += imported_names(path.read_bytes(), package)
    return files


def function_sources(stage_class: type) -> dict[str, str]:
    """{name: source} of a class's own functions; empty at a Python prompt, which keeps none."""
    sources = {}
    with contextlib.suppress(OSError):
        for name, member in vars(stage_class).items():
            if inspect.isfunction(member):
                sources[name] = inspect.getsource(member)
    return sources


def modules_of_notebook_class(stage_class: type, sources: Mapping[str, str]) -> list[str]:
    """The modules that a class without a file uses: those of its bases and of what it names."""
    home = sys.modules[stage_class.__module__]
    modules = [parent.__module__ for parent in stage_class.__mro__]
    # Not all globals of a notebook: an unrelated cell shall not make the stage another one.
    for word in re.findall(r"\w+", " ".join(sources.values())):
        value = vars(home).get(word)
        if inspect.ismodule(value):
            modules.append(value.__name__)
        elif inspect.isclass(value) or inspect.isfunction(value):
            modules.append(value.__module__)
    return modules


@functools.cache
def digest_when_imported(module: ModuleType) -> str:
    """The hash of a module's file when it was first asked for.

    Python goes on with the code that it imported, whatever happens to the file afterwards.
    """
    return file_digest(Path(module.__file__))


def fingerprint_code(stage_class: type) -> tuple[dict[str, str], list[str]]:
    """({file: hash} of a stage's code, [files that changed since Python imported them]).

    The code is the file of the stage's class and what that imports, followed through the
    repository's own files and those beside it. A class that a notebook defines has no file:
    its functions are hashed one by one.
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
            digests[f"{name}()"] = hashlib.sha256(source.encode()).hexdigest()

    changed = set()
    for name, path in find_code(names, home_folder).items():
        # Two folders may have a file of the same name: those of the repository are named by path.
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
        digest = file_digest(path)
        digests[shown.as_posix()] = digest
        module = sys.modules.get(name)
        if module is not None and digest_when_imported(module) != digest:
            changed.add(shown.as_posix())
    return dict(sorted(digests.items())), sorted(changed)


# -- the whole ------------------------------------------------------------------------------------


def compute_fingerprint(
    config: StageConfig, stage_class: type, data_digest: str | None, start: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(fingerprint, [code files that changed since Python imported them]) of a stage.

    `data_digest` is the hash of its rows and `start` that of the stages before it in a chain; None
    where there is none.
    """
    options = fingerprinted_options(config)
    code, changed = fingerprint_code(stage_class)
    fingerprint = {
        "options": options,
        "data": data_digest,
        "start": start,
        "files": identify_named_files(options),
        "code": code,
    }
    return fingerprint, changed


def describe_differences(old: Mapping, new: Mapping) -> str:
    """What differs between two fingerprints, in words for the log; empty if nothing does."""
    differences = []
    for part, now in new.items():
        before = old.get(part)
        if before == now:
            continue
        if isinstance(now, dict):
            differences += describe_changed_keys(part, old[part], now)
        elif part == "data":
            differences.append("its data changed")
        elif part == "start":
            differences.append("a stage before it changed")
        else:
            differences.append(f"processes {before} -> {now}")
    return "; ".join(differences)


def describe_changed_keys(part: str, old: Mapping, new: Mapping) -> list[str]:
    """One phrase for each key whose value differs; only options are readable enough to be shown."""
    phrases = []
    for key in sorted({**old, **new}):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        phrases.append(f"{key} {before!r} -> {now!r}" if part == "options" else f"{key} changed")
    return phrases
