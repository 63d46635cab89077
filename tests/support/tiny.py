"""Small random models of every supported architecture, with unusual settings: what their configs have, and the models themselves."""

from transformers import AutoConfig, AutoModelForCausalLM

from dsla_hf.models.trial.small_models import make_uneven

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WITHOUT_HEAD_DIM = ("phi3",)  # its config has none of its own
SCORE_CAPPED = ("gemma2", "vaultgemma")  # SDPA knows no score cap: older releases of transformers leave it out there without a word

# One each of what attention differs in: plain; a score cap and local layers; one matrix of queries, keys and values; sinks and experts.
IN_DEPTH = ("llama", "gemma2", "phi3", "gpt_oss")

LOCAL_AND_GLOBAL = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
# What the config of each architecture that is tested in depth has beyond the sizes.
ARCHITECTURE_OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {**LOCAL_AND_GLOBAL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "gemma3_text": {**LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 5},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.9},
    "cohere2": LOCAL_AND_GLOBAL,
    "gpt_oss": {**LOCAL_AND_GLOBAL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
WIDE = {"head_dim": 12}  # heads that together are wider than the hidden states
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4}
ROUTED = {**GROUPS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNTIED = {"tie_word_embeddings": False}
# Models of which some layers are linear already: four others can be converted.
MIXED_LAYERS = ["linear_attention", "full_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]
LINEAR_AND_FULL = {"num_hidden_layers": 6, "layer_types": MIXED_LAYERS}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATE_SPACE = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8, "mamba_expand": 2}
# Of all others, which one test goes over in short, and eval/architectures.py in full.
OTHER_ARCHITECTURE_OPTIONS = {
    "apertus": {"rope_parameters": LLAMA3, "attention_bias": True},
    "arcee": {"rope_parameters": YARN, "mlp_bias": True, "attention_bias": True},
    "cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    "cwm": {**LOCAL_AND_GLOBAL, "rope_parameters": LLAMA3},
    "dots1": {**LOCAL_AND_GLOBAL, **ROUTED, "attention_bias": True},
    "ernie4_5": {"use_bias": True, **WIDE},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1, "use_bias": True},
    "exaone4": LOCAL_AND_GLOBAL,
    "exaone_moe": {
        **LOCAL_AND_GLOBAL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "gemma": {**WIDE, "attention_bias": True},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "layer_types": [kind.replace("linear", "sliding") for kind in MIXED_LAYERS],
        "sliding_window": 12,
        "num_key_value_heads": 4,
        "global_head_dim": 12,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "glm": {**PART, **UNTIED},
    "glm4": {**PART, **WIDE},
    "glm4_moe": {**PART, **ROUTED, "use_qk_norm": True, "attention_bias": True},
    "granite_swa": {**LOCAL_AND_GLOBAL, "attention_multiplier": 0.3, "attention_bias": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3, "residual_multiplier": 0.9},
    "helium": {"attention_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True, **WIDE},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, **PART},
    "ministral": {**LOCAL_AND_GLOBAL, **WIDE},
    "ministral3": {**WIDE, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
    "nanochat": {"attention_bias": True, "final_logit_softcapping": 5.0},
    "olmo": {"clip_qkv": 1.5},
    "olmo3": {**LOCAL_AND_GLOBAL, "attention_bias": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
    "seed_oss": {**WIDE, "attention_out_bias": True},
    "starcoder2": {"sliding_window": None},
    "stablelm": {**PART, "qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True},
    "vaultgemma": {**LOCAL_AND_GLOBAL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "falcon_h1": {**STATE_SPACE, "mamba_d_ssm": 64, "key_multiplier": 0.7, "attention_out_multiplier": 0.8, "attention_bias": True},
    "granitemoehybrid": {
        **LINEAR_AND_FULL,
        **STATE_SPACE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "attention_multiplier": 0.3,
        "position_embedding_type": "rope",
        "attention_bias": True,
    },
    "lfm2": {**LINEAR_AND_FULL, "layer_types": [kind.replace("linear_attention", "conv") for kind in MIXED_LAYERS], "conv_bias": True},
    "lfm2_moe": {
        **LINEAR_AND_FULL,
        "layer_types": [kind.replace("linear_attention", "conv") for kind in MIXED_LAYERS],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "olmo_hybrid": {**LINEAR_AND_FULL, **DELTA, "attention_bias": True},
    "qwen3_5_moe_text": {
        **LINEAR_AND_FULL,
        **DELTA,
        **PART,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "initializer_range": 0.1,
    },
    "nemotron": {**PART, "attention_bias": True, "mlp_bias": True},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention", "moe", "full_attention", "full_attention"],
        "num_hidden_layers": 7,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        **ROUTED,
        "moe_shared_expert_intermediate_size": 16,
        "initializer_range": 0.1,
        **WIDE,
        **UNTIED,
    },
    "qwen3_5_text": {**LINEAR_AND_FULL, **DELTA, **PART, "attention_bias": True, "initializer_range": 0.1},
    "qwen3_next": {
        **LINEAR_AND_FULL,
        **DELTA,
        **PART,
        **WIDE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def tiny_config(kind, **config):
    """The config of a small model; keyword arguments replace what it has."""
    sizes = {name: value for name, value in SIZES.items() if not (name == "head_dim" and kind in WITHOUT_HEAD_DIM)}
    particulars = ARCHITECTURE_OPTIONS[kind] if kind in ARCHITECTURE_OPTIONS else OTHER_ARCHITECTURE_OPTIONS[kind]
    return AutoConfig.for_model(kind, **{**sizes, **particulars, **config})


def tiny_model_of(kind, uneven=False, **config):
    """A small random causal LM of an architecture.

    uneven: norms, biases and sink logits, which start at 0 or 1, are moved, so that one that is left out or of the wrong head is seen.
    """
    options = {"attn_implementation": "eager"} if kind in SCORE_CAPPED else {}
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **config), **options).eval()
    return make_uneven(model) if uneven else model
