"""Weights quantized by bitsandbytes: checking what was quantized, and dequantizing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch

from core.errors import ConfigError
from core.runtime import logger

QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")  # classes of bitsandbytes


def check_quantized(model) -> None:
    """Warn if most weights were not quantized; raises ConfigError if none were."""
    kind = model.config.model_type
    kept = quantized = 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if type(module).__name__ in QUANTIZED_LAYERS and weight.dim() > 1:
                quantized += module.in_features * module.out_features
            elif weight.dim() > 1:
                kept += weight.numel()
    if not quantized:
        raise ConfigError(f"a model of type {kind} cannot be quantized; load it in 16 bits")
    share = kept / (kept + quantized)
    if share > 0.5:
        size = kept * model.dtype.itemsize / 1e9
        logger.warning(
            "%.0f%% of the weights (%.1f GB) are not quantized: linear layers are, "
            "embeddings and experts are not",
            100 * share,
            size,
        )


@contextlib.contextmanager
def refusing_integers(model) -> Iterator[None]:
    """Raise ConfigError if a quantized layer is given integers in the block: some models cast an
    input to the dtype of the layer's weights, which is an integer in 4 bits."""

    def check(module, inputs) -> None:
        if not inputs[0].is_floating_point():
            raise ConfigError(
                f"a model of type {model.config.model_type} cannot be quantized: it casts "
                "inputs to the dtype of the weights; load it in 16 bits"
            )

    quantized = [m for m in model.modules() if type(m).__name__ in QUANTIZED_LAYERS]
    handles = [module.register_forward_pre_hook(check) for module in quantized]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_training_mode(module) -> None:
    """Make `module.train(mode)` and `module.eval()` do nothing."""

    def train(mode: bool = True):
        return module

    module.train = train


def dequantize_base(model):
    """A PEFT model with its quantized base converted to floating point."""
    from peft import get_peft_model

    # Without the quantized ones, whose memory dequantizing frees.
    weights = {name: w for name, w in model.named_parameters() if w.is_floating_point()}
    lora = model.peft_config["default"]
    base = model.unload().dequantize()
    restore_conv1d(base)
    # dequantize() leaves these flags set, and save_pretrained and PEFT read them.
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    linear = next(module for module in base.modules() if isinstance(module, torch.nn.Linear))
    cast_weights(base, linear.weight.dtype)

    model = get_peft_model(base, lora)
    without_adapter = lora_layers(weights) - lora_layers(dict(model.named_parameters()))
    if without_adapter:
        # PEFT takes some names, such as gate_proj, for those of experts, and leaves layers of the
        # same name out. As parameters they get an adapter.
        parameters = [f"{layer}.weight" for layer in sorted(without_adapter)]
        parameters += lora.target_parameters or []
        lora = dataclasses.replace(lora, target_parameters=parameters)
        model = get_peft_model(model.unload(), lora)
    # By name: PEFT's own loading renames weights by the patterns of the model's checkpoint.
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(weights[name])
    return model


def lora_layers(names: Iterable[str]) -> set[str]:
    """The layers that have a LoRA adapter, by the names of a PEFT model's weights."""
    with_adapter = [name.partition(".lora_A")[0] for name in names if ".lora_A" in name]
    return {layer.removeprefix("base_model.model.") for layer in with_adapter}


def restore_conv1d(model) -> None:
    """Convert linear layers back to Conv1D, in place, if quantization has replaced Conv1D: in the
    files of such a model (GPT-2) the weights are (in, out)."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        original = AutoModelForCausalLM.from_config(model.config)
    for name, layer in original.named_modules():
        if not isinstance(layer, Conv1D):
            continue
        linear = model.get_submodule(name)
        if isinstance(linear, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
            layer.bias = torch.nn.Parameter(linear.bias.data)
            model.set_submodule(name, layer)


def cast_weights(model, dtype: torch.dtype):
    """`model` with weights in `dtype`; buffers, such as rotary frequencies, are unchanged."""
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise ConfigError(
            "a quantized model cannot be passed in; give its folder and set use_4bit or use_8bit"
        )
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
