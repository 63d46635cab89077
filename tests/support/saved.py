"""A small checkpoint and an adapter for it in a folder, as commands and scripts take them."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer


def save_base_and_adapter(folder, text, chat_template=None):
    """`base`, a Llama of two layers with a tokenizer of `text`, and `adapter`, of layers."""
    tokenizer = train_tokenizer([text], vocab_size=320)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8)).save_pretrained(str(folder / "adapter"))
