"""Where a model lies: a folder, an adapter on a base, the hub, a .gguf file, also of an installed package."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.config import ModelConfig
from core.errors import ConfigError, as_config_error
from core.files import cached_folder

FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gguf", ".txt")  # no hub name ends so


def hub_is_reachable(kind: str, name: str) -> bool:
    """Whether the hub can be reached (its client would retry for half a minute). Refuses what can only be a path."""
    if (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or Path(name).suffix in FILE_SUFFIXES
    ):
        raise ConfigError(f"{kind} {name}: no such file or folder")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5
        ).close()
    except OSError as error:
        return hasattr(error, "code")  # an HTTPError has one: it is an answer
    return True


def find_model(name: str, config: ModelConfig, weights: bool = True) -> Path:
    """The folder of a model: as named, downloaded from the hub, or converted from a .gguf file, also of an installed
    package. Without `weights` none are converted or downloaded. Raises ConfigError when there is no such model."""
    from huggingface_hub import snapshot_download

    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        spec = importlib.util.find_spec(path.parts[0]) if path.parts[0].isidentifier() else None
        homes = spec.submodule_search_locations or [] if spec else []
        found = [
            file
            for file in (path, *(Path(home, *path.parts[1:]) for home in homes))
            if file.is_file()
        ]
        if found:
            build = lambda folder: convert_gguf(found[0], folder)
            return cached_folder("converting", found[:1], build if weights else None) or found[0]
    if path.exists():
        if path.is_dir() and not config.revision:
            return path
        wrong = (
            "is a file; give its folder"
            if path.is_file()
            else "is a folder, and revision goes with a hub name"
        )
        raise ConfigError(f"model {name} {wrong}")
    files = ["*.json", "*.jinja", "*.model", "*.txt"] + [
        "model*.safetensors",
        "adapter_model.safetensors",
    ] * weights
    files += ["*.py"] if config.trust_remote_code else []
    ask: dict[str, Any] = {
        "revision": config.revision,
        "token": config.use_auth_token or None,
        "allow_patterns": files,
    }
    online = hub_is_reachable("model", name)
    with as_config_error(
        f"model {name}: no such folder, and {'the hub says' if online else 'the hub cannot be reached'}"
    ):
        return Path(snapshot_download(name, local_files_only=not online, **ask))


def check_model(name: str | None) -> None:
    """Refuse another model than the stage's own that is not there; stage:NAME is not there yet."""
    if name and not name.startswith("stage:"):
        find_model(name, ModelConfig(model_name_or_path=name), weights=False)


def find_model_parts(config: ModelConfig, weights: bool = True) -> tuple[Path, Path | None, Path]:
    """(model, adapter on it or None, tokenizer) of `model_name_or_path`: where they lie, as `find_model` says."""
    folder = find_model(config.model_name_or_path, config, weights)
    if not (folder / "adapter_config.json").exists():
        return folder, None, folder
    with as_config_error(f"model {config.model_name_or_path} cannot be loaded"):
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = find_model(name, replace(config, revision=None), weights)
    return base, folder, folder if (folder / "tokenizer_config.json").exists() else base


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bars
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del (
        model.config.quantization_config
    )  # the weights are plain by now; save_pretrained goes by this field
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
