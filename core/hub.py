"""Find a model and its tokenizer: a folder, an adapter on a base, the hub, or a .gguf file."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.config import ModelConfig
from core.errors import ConfigError, as_config_error
from core.files import cached_folder
from core.model_config import check_model_config, read_stop_tokens
from core.recipe_files import is_link

FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gguf", ".txt")  # never of hub names
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration and tokenizer
WEIGHT_FILES = ("model*.safetensors", "adapter_model.safetensors")
CODE_FILES = ("*.py",)


# ---- the hub -------------------------------------------------------------------------------------


def hub_is_reachable(kind: str, name: str) -> bool:
    """Whether the hub answers within five seconds; its client would retry for half a minute.

    Raises ConfigError if `name` can only be a path, because then the file or folder is missing.
    `kind` says in the message what the name stands for.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or Path(name).suffix in FILE_SUFFIXES:
        raise ConfigError(f"{kind} {name}: no such file or folder")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an error status is an answer too
    except OSError:
        return False
    return True


def download_model(name: str, config: ModelConfig, weights: bool) -> Path:
    """The local folder of a model from the hub, downloaded if needed. Raises ConfigError."""
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_FILES]
    if weights:
        patterns += WEIGHT_FILES
    if config.trust_remote_code:
        patterns += CODE_FILES
    online = hub_is_reachable("model", name)
    reason = "the hub answers" if online else "the hub cannot be reached"
    # When offline, use the cache, which may have the model.
    with as_config_error(f"model {name}: no such folder, and {reason}"):
        folder = snapshot_download(
            name,
            revision=config.revision,
            token=config.use_auth_token or None,
            allow_patterns=patterns,
            local_files_only=not online,
        )
        return Path(folder)


# ---- finding a model -----------------------------------------------------------------------------


def find_model(name: str, config: ModelConfig, weights: bool = True) -> Path:
    """The folder of a model: local, from the hub, or converted from a .gguf file.

    Without `weights` no weights are downloaded or converted; then the result may be the .gguf file.
    Raises ConfigError if there is no such model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        file = find_gguf(path)
        if file:
            return find_converted(file, weights)
    if path.is_file():
        raise ConfigError(f"model {name} is a file; give its folder")
    if path.exists():
        if config.revision:
            raise ConfigError(f"model {name} is a folder, but revision is only for a hub name")
        return path
    return download_model(name, config, weights)


def find_model_parts(config: ModelConfig, weights: bool = True) -> tuple[Path, Path | None, Path]:
    """(model, adapter on it or None, tokenizer): the folders for `model_name_or_path`."""
    folder = find_model(config.model_name_or_path, config, weights)
    check_weight_index(folder)
    adapter_config = folder / "adapter_config.json"
    if not adapter_config.exists():
        return folder, None, folder
    with as_config_error(f"model {config.model_name_or_path} cannot be loaded"):
        base_name = json.loads(adapter_config.read_text())["base_model_name_or_path"]
        # `revision` belongs to the adapter.
        base = find_model(base_name, replace(config, revision=None), weights)
        check_weight_index(base)
    tokenizer = folder if (folder / "tokenizer_config.json").exists() else base
    return base, folder, tokenizer


def check_weight_index(folder: Path) -> None:
    """Raise ConfigError if a weight index names a file outside of the model's folder."""
    for index in folder.glob("*.safetensors.index.json"):
        with as_config_error(f"{index} is not an index of weights"):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strange_names = sorted(name for name in names if Path(name).name != name)
        if strange_names:
            raise ConfigError(
                f"{index} names weights outside of its folder: {strange_names[0]!r}; download "
                "the model again from a source that you trust"
            )


def check_model(name: str | None) -> None:
    """Raise ConfigError if another model named in a stage's options does not exist.

    stage:NAME, the result of an earlier stage of the chain, is not checked.
    """
    if name and not is_link(name):
        find_model(name, ModelConfig(model_name_or_path=name), weights=False)


# ---- everything except the weights ---------------------------------------------------------------


def load_tokenizer(config: ModelConfig) -> tuple:
    """(tokenizer, model configuration) of `model_name_or_path` as stored; reads no weights.

    Raises ConfigError if they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    model_path, adapter, tokenizer_path = find_model_parts(config, weights=False)
    with as_config_error(f"model {config.model_name_or_path} cannot be loaded"):
        tokenizer = load_part(AutoTokenizer, tokenizer_path, config)
        # Read by core.chat.stop_tokens: published models often stop at several tokens.
        tokenizer.stops_of_the_model = read_stop_tokens(model_path)
        model_config = load_part(AutoConfig, model_path, config)
        check_model_config(config, tokenizer, model_config, may_grow=adapter is not None)
        return tokenizer, model_config


def load_part(auto_class: Any, path: Path, config: ModelConfig):
    """`auto_class.from_pretrained` for a folder or a .gguf file."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if path.is_file():
        return auto_class.from_pretrained(path.parent, gguf_file=path.name, **options)
    return auto_class.from_pretrained(path, **options)


def load_skeleton(config: ModelConfig) -> tuple:
    """(tokenizer, model on the meta device): everything except the weights."""
    from transformers import AutoModelForCausalLM

    tokenizer, model_config = load_tokenizer(config)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    what = f"model {config.model_name_or_path} cannot be loaded"
    with as_config_error(what), torch.device("meta"):
        return tokenizer, AutoModelForCausalLM.from_config(model_config, **options)


# ---- .gguf files ---------------------------------------------------------------------------------


def find_gguf(path: Path) -> Path | None:
    """The .gguf file at `path`, or at that path in an installed package; None if none exists."""
    if path.is_file():
        return path
    package_name = path.parts[0]
    if not package_name.isidentifier():
        return None
    # find_spec does not import the package, which may need libraries that are not installed.
    package = importlib.util.find_spec(package_name)
    if package is None or package.submodule_search_locations is None:
        return None
    for location in package.submodule_search_locations:
        file = Path(location, *path.parts[1:])
        if file.is_file():
            return file
    return None


def find_converted(file: Path, weights: bool) -> Path:
    """The folder with a .gguf file converted; without `weights`, the file if not yet converted."""

    def build(folder: Path) -> None:
        convert_gguf(file, folder)

    return cached_folder("converting", [file], build if weights else None) or file


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what libraries write to stderr, such as progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model (float32 safetensors) and the tokenizer of a .gguf file to `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silent_stderr():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are dequantized now, but save_pretrained would still use this field.
    del model.config.quantization_config
    plain_model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain_model.load_state_dict(model.state_dict())
    plain_model.generation_config = model.generation_config
    plain_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
