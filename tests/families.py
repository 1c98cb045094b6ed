"""Tiny random models of the families that people fine-tune."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=0,
    bos_token_id=None,
)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
STATES = dict(
    mamba_n_heads=4,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_d_ssm=128,
    mamba_expand=2,
    mamba_chunk_size=16,
)
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
# A window shorter than the rows of the tests.
WINDOW = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
LAYERS_OF_GEMMA_4 = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=16,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=1024,
)
SMALL_EYE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)

# {family: (model type, options of its configuration)}; "text_config" gets the sizes of a whole.
FAMILIES = {
    "GPT-2": ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)),
    "GPT-NeoX": ("gpt_neox", {}),
    "Llama 3": ("llama", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2.5 with a window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=0),
    ),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-Next": (
        "qwen3_next",
        dict(**EXPERTS, **LINEAR_ATTENTION, shared_expert_intermediate_size=32),
    ),
    "Qwen3.5": (
        "qwen3_5",
        dict(
            text_config=LINEAR_ATTENTION,
            vision_config=dict(
                depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64
            ),
        ),
    ),
    "Mistral": ("mistral", dict(sliding_window=16)),
    "Mixtral": ("mixtral", EXPERTS),
    "Mistral Small 3.1": (
        "mistral3",
        dict(text_config=dict(model_type="mistral"), vision_config=dict(**SMALL_EYE, head_dim=16)),
    ),
    "Gemma 2": ("gemma2", dict(sliding_window=16, query_pre_attn_scalar=16)),
    "Gemma 3, text": ("gemma3_text", dict(**WINDOW, query_pre_attn_scalar=16)),
    "Gemma 3": (
        "gemma3",
        dict(
            text_config=dict(**WINDOW, query_pre_attn_scalar=16),
            vision_config=dict(**SMALL_EYE, image_size=28, patch_size=14),
        ),
    ),
    "Gemma 3n, text": (
        "gemma3n_text",
        dict(**LAYERS_OF_GEMMA_4, laurel_rank=8, altup_num_inputs=2),
    ),
    "Gemma 4, text": (
        "gemma4_text",
        dict(
            **LAYERS_OF_GEMMA_4,
            global_head_dim=16,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
        ),
    ),
    "Gemma 4": (
        "gemma4",
        dict(
            text_config=dict(**LAYERS_OF_GEMMA_4, global_head_dim=16, use_double_wide_mlp=True),
            vision_config=dict(**SMALL_EYE, head_dim=16),
            audio_config=None,
        ),
    ),
    "Phi-3, Phi-4": ("phi3", {}),
    "Phi-2": ("phi", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "SmolLM3": ("smollm3", {}),
    "Falcon": (
        "falcon",
        dict(new_decoder_architecture=False, multi_query=True, alibi=False, bias=False),
    ),
    "Falcon-H1": ("falcon_h1", STATES),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", dict(sliding_window=16)),
    "DeepSeek-V3": (
        "deepseek_v3",
        dict(
            **EXPERTS,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
            head_dim=8,
            num_key_value_heads=4,
        ),
    ),
    "DeepSeek-V4": ("deepseek_v4", EXPERTS),
    "GPT-OSS": ("gpt_oss", dict(**EXPERTS, **WINDOW)),
    "Granite": ("granite", {}),
    "Granite-MoE": ("granitemoe", EXPERTS),
    "Granite 4": (
        "granitemoehybrid",
        dict(**EXPERTS, **STATES, layer_types=["mamba", "attention"], shared_intermediate_size=64),
    ),
    "Cohere 2": ("cohere2", WINDOW),
    "GLM-4": ("glm4", {}),
    "BLOOM": ("bloom", dict(n_layer=2, n_head=4)),
    "OPT": ("opt", dict(ffn_dim=128, word_embed_proj_dim=64)),
    "GPT-Neo": (
        "gpt_neo",
        dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16),
    ),
    "Mamba": ("mamba", dict(state_size=8)),
    "Mamba-2": (
        "mamba2",
        dict(num_heads=4, head_dim=32, state_size=16, n_groups=1, chunk_size=16),
    ),
    "Jamba": (
        "jamba",
        dict(
            **EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "Kimi Linear": (
        "kimi_linear",
        dict(
            **EXPERTS,
            layer_types=["linear_attention", "full_attention"],
            linear_head_dim=16,
            linear_num_heads=4,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            num_key_value_heads=4,
        ),
    ),
    "Laguna": ("laguna", dict(**EXPERTS, shared_expert_intermediate_size=64)),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"], block_multiple_of=16)),
    "Nemotron-H": (
        "nemotron_h",
        dict(
            **EXPERTS,
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=1,
            chunk_size=16,
            layers_block_type=["mamba", "attention"],
        ),
    ),
    "Llama 4": (
        "llama4",
        dict(
            text_config=dict(
                **EXPERTS,
                intermediate_size_mlp=64,
                attention_chunk_size=16,
                interleave_moe_layer_step=2,
            ),
            vision_config=dict(
                **SMALL_EYE,
                image_size=28,
                patch_size=14,
                projector_input_dim=32,
                projector_output_dim=32,
                vision_output_dim=32,
            ),
        ),
    ),
    "T5": ("t5", dict(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16)),
    "BART": (
        "bart",
        dict(
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        ),
    ),
}
# What AutoModelForCausalLM does not make a model of.
OTHER_CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}


def make_family(name, tokenizer):
    """A random model of the family, in float32."""
    kind, options = FAMILIES[name]
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    if kind == "falcon":
        del sizes["head_dim"]
    if "text_config" in options:
        options = options | {"text_config": sizes | options["text_config"]}
        config = AutoConfig.for_model(kind, **options, tie_word_embeddings=False)
    else:
        config = AutoConfig.for_model(kind, **sizes | options)
    torch.manual_seed(0)
    if kind in OTHER_CLASSES:
        return getattr(transformers, OTHER_CLASSES[kind])(config)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
