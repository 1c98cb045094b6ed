"""Which weights train: all of them, or a LoRA adapter (Hu et al. 2021) on the linear layers.

"all-linear" means every matrix inside the language model except embeddings and output layer: the
linear layers, Conv1D, and the experts of a mixture, which are parameters (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.config import TrainingConfig
from core.errors import ConfigError
from core.new_tokens import trainable_rows
from core.runtime import logger

# {model type: layers whose weights are read directly, by kernels or by the model itself, so that an
# adapter on them would have no effect}.
READ_DIRECTLY = dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), ("out_proj",)) | {
    "mamba": ("x_proj", "dt_proj", "out_proj"),
    "falcon_mamba": ("x_proj", "dt_proj", "out_proj"),
    "jamba": ("x_proj", "dt_proj", "out_proj"),
    "granitemoehybrid": ("mamba.out_proj",),
    "bamba": ("mamba.out_proj",),
}


def add_adapter(
    model, config: TrainingConfig, task: str = "CAUSAL_LM", new_ids: Sequence[int] = ()
):
    """`model` with a new adapter; only it and the rows `new_ids` of the embeddings train.

    If lora_r is 0, all weights train, except those of another modality. Raises ConfigError for
    targets that the model does not have or that cannot have an adapter.
    """
    if not config.lora_r:
        model.requires_grad_(True)
        for weight in other_modalities(model):
            weight.requires_grad_(False)
        return model
    from peft import LoraConfig, prepare_model_for_kbit_training

    options: dict[str, Any] = dict(
        task_type=task,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.lora_bias,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        **trainable_rows(model, new_ids),
    )
    if hasattr(model, "hf_quantizer"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if config.lora_target_modules not in ([], ["all-linear"]):
        named = named_targets(model, config.lora_target_modules)
        return wrap(model, LoraConfig(**options, **named))

    matrices = matrices_of(model)
    excluded = layers_without_adapter(model)
    experts = [name for name, weight in matrices.items() if weight.dim() == 3]
    targets: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": excluded or None}
    adapted = wrap(model, LoraConfig(**options, **targets, target_parameters=experts or None))
    # PEFT treats some names, such as gate_proj, as names of experts only.
    reached = adapted_weights(adapted)
    left = []
    for name, weight in matrices.items():
        is_wanted = name.removesuffix(".weight") not in excluded
        # Quantized weights take an adapter on the layer, not on the parameter.
        if is_wanted and id(weight) not in reached and weight.is_floating_point():
            left.append(name)
    if left:
        lora = LoraConfig(**options, **targets, target_parameters=experts + left)
        adapted = wrap(adapted.unload(), lora)
    return adapted


def wrap(model, lora):
    """`get_peft_model`; raises ConfigError if PEFT refuses."""
    from peft import get_peft_model
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    try:
        model = get_peft_model(model, lora)
        for module in model.modules():
            if isinstance(module, TrainableTokensLayer):
                module.cast_input_dtype_enabled = True  # expected by disable_input_dtype_casting
        return model
    except (ValueError, TypeError) as error:
        reason = str(error).replace("lora.ParamWrapper", "an adapter on experts")
        raise ConfigError(f"this adapter does not fit the model: {reason}") from error


def merge_saved_adapter(model, folder: Path):
    """`model` with the adapter saved in `folder` merged. Raises ConfigError if parts of the adapter
    have no place in the model."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    # PeftModel.from_pretrained would not say which weights it did not use.
    model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    weights = load_file(folder / "adapter_model.safetensors")
    result: Any = set_peft_model_state_dict(model, weights)
    unused = result.unexpected_keys
    if model.config.get_text_config().tie_word_embeddings:
        # New rows of the embeddings are those of the output layer too.
        unused = [name for name in unused if ".token_adapter." not in name]
    if unused:
        raise ConfigError(
            f"adapter {folder}: {len(unused)} of its weights do not fit the model, such as "
            f"{unused[0]}; give the merged model, which a stage saves beside its adapter"
        )
    return model.merge_and_unload()


def is_linear(module) -> bool:
    """Whether a module is a matrix product: a linear layer, quantized or not, or a Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def is_plain_product(layer) -> bool:
    """Whether a linear layer returns only the product of its input and its weight. A router returns
    several tensors, and a grouped layer splits its input."""
    # Classes of torch, PEFT and bitsandbytes do; those defined in a model's files may not.
    if not type(layer).__module__.startswith(("transformers.models.", "transformers_modules.")):
        return True
    try:
        output = layer(layer.weight.new_zeros(1, layer.in_features))
    except (RuntimeError, TypeError, ValueError):  # it takes another input
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)


def other_modalities(model) -> list[torch.nn.Parameter]:
    """The weights that are not used for text, such as those of a vision tower."""
    if model.config.get_text_config() is model.config:
        return []
    inside = {id(weight) for weight in model.get_decoder().parameters()}
    return [weight for weight in model.base_model.parameters() if id(weight) not in inside]


def matrices_of(model) -> dict[str, torch.nn.Parameter]:
    """{name: weight} of all linear layers and experts used for text, except the output layer."""
    outside = {id(weight) for weight in other_modalities(model)}
    output_layer = model.get_output_embeddings()
    matrices = {}
    for layer_name, layer in model.named_modules():
        holds_experts = "experts" in type(layer).__name__.lower()
        is_head = layer is output_layer or layer_name == "score"
        for name, weight in layer.named_parameters(recurse=False):
            is_matrix = is_linear(layer) and name == "weight" and not is_head
            is_expert = holds_experts and weight.dim() == 3
            is_of_adapter = "lora_" in layer_name or "token_adapter" in layer_name
            if (is_matrix or is_expert) and not is_of_adapter and id(weight) not in outside:
                matrices[f"{layer_name}.{name}"] = weight
    return matrices


def layers_without_adapter(model) -> list[str]:
    """The linear layers that "all-linear" leaves out: those of another modality, those that are not
    a plain product, and those whose weights are read directly."""
    outside = {id(weight) for weight in other_modalities(model)}
    direct = READ_DIRECTLY.get(model.config.model_type, ())
    names = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        is_read_directly = any(f".{name}".endswith(f".{end}") for end in direct)
        if id(module.weight) in outside or is_read_directly or not is_plain_product(module):
            names.append(name)
    return names


def adapted_weights(model) -> set[int]:
    """The ids of the weights that the adapter of a PEFT model adapts."""
    from peft.tuners.lora import LoraLayer

    reached = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            name = getattr(module, "parameter_name", "weight")  # experts have several parameters
            reached.add(id(getattr(module.get_base_layer(), name)))
    return reached


def share_adapted(model) -> float:
    """Log and return the fraction of the weights in `matrices_of` that an adapter adapts."""
    reached = adapted_weights(model)
    matrices = matrices_of(model.get_base_model()).values()
    total = sum(weight.numel() for weight in matrices)
    share = sum(weight.numel() for weight in matrices if id(weight) in reached) / total
    if share < 0.995:
        logger.info("the adapter covers %.0f%% of the weights in linear layers", 100 * share)
    return round(share, 4)


def named_targets(model, targets: Sequence[str]) -> dict[str, Any]:
    """LoraConfig options for names given by the user, of layers or of experts' parameters.

    Raises ConfigError for a name that the model does not have, and for tied embeddings."""
    layers = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if is_linear(module) and is_plain_product(module)
    }
    experts = {
        name.split(".")[-1] for name, weight in matrices_of(model).items() if weight.dim() == 3
    }
    unknown = sorted(set(targets) - layers - experts)
    if unknown:
        known = ", ".join(sorted(layers | experts))
        raise ConfigError(f"lora_target_modules={','.join(unknown)}: the model has only {known}")
    output_layer = model.get_output_embeddings()
    is_tied = (
        output_layer is not None and output_layer.weight is model.get_input_embeddings().weight
    )
    ends = {name.split(".")[-1] for name, module in model.named_modules() if module is output_layer}
    if is_tied and ends & set(targets):
        raise ConfigError(
            f"lora_target_modules={','.join(ends)}: this layer is also the input embeddings, which "
            "merging the adapter would change; leave it out"
        )
    return {
        "target_modules": sorted(set(targets) & layers),
        "target_parameters": sorted(set(targets) & experts - layers) or None,
    }
