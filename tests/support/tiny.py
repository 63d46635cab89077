"""What the config of each architecture has beyond the sizes that all small models of the tests share."""

LOCAL_AND_GLOBAL = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
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
