"""A rehearsal, before training, of what happens at its end: merging, saving, disk space."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from core.config import TrainingConfig
from core.errors import as_config_error
from core.files import check_disk_space, unfinished_name
from core.runtime import is_main_process

BYTES_OF_A_TRAINED_WEIGHT = 4  # float32


def rehearse_end(model, tokenizer, config: TrainingConfig) -> None:
    """Raise ConfigError if merging or saving the trained `model` would fail."""
    if not config.save_intermediate or not is_main_process():
        return
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    # The model, the adapter, and the checkpoint that is kept until the stage is recorded.
    needed = base.num_parameters() * config.weight_dtype.itemsize
    needed += 2 * num_trained * BYTES_OF_A_TRAINED_WEIGHT
    check_disk_space(config.output_dir, needed)

    with as_config_error("after training, the adapter could not be merged into the model"):
        for layer in adapted_layers(model):
            # Merge a copy, because unmerging would change the last bits of the weights.
            copy.deepcopy(layer).merge(safe_merge=True)

    trial = unfinished_name(Path(config.output_dir, "trial"))
    try:
        # Other errors, such as a full disk, are not the user's mistake, but fail the stage too.
        with as_config_error("after training, the model could not be saved", ValueError):
            base.config.save_pretrained(trial)
            if base.can_generate():
                base.generation_config.save_pretrained(trial)
            tokenizer.save_pretrained(trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def adapted_layers(model) -> list:
    """The first layer of each kind to which an adapter was added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    first_of_kind: dict[type, object] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            first_of_kind.setdefault(type(module), module)
    return list(first_of_kind.values())
