"""Our server with random weights, made where it runs: a process that evaluations start, for speed does not depend on what weights say.

    python eval/random_server.py --shape llama3-8b --policy kept:10% --port 8000

`--policy 0` serves the base alone, anything else the base with a fresh adapter whose levels count KV heads. Ready as `dsla serve` is, when
/health answers 200.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from peft import get_peft_model
from serving import numbers_tokenizer
from transformers import AutoConfig

from dsla_hf import DSLAConfig
from dsla_hf.inference.bench.models import PRESETS, preset_config, random_model
from dsla_hf.inference.recorder import CudaRecording
from dsla_hf.models.configuration import resolve_level
from dsla_hf.serving.command import ServeOptions, check_address, policy_of, run
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.kv_dtype import KV_CACHE_DTYPES
from dsla_hf.serving.http.api import ApiOptions

# For a CPU: heads are as large as the least that other servers take there.
SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = ("small", *PRESETS)
WINDOWS = {"small": 16}  # of converted heads, tokens; others as `dsla distill` has it
WINDOW = 512
HOST = "127.0.0.1"


def config_of(shape: str) -> Any:
    """The configuration of a base of this shape."""
    if shape == "small":
        return AutoConfig.for_model("llama", **SMALL, vocab_size=512, max_position_embeddings=4096)
    return preset_config(shape)


def plan_of(shape: str) -> DSLAConfig:
    """Levels in KV heads; converted ones have a window alone."""
    return DSLAConfig(task_type="CAUSAL_LM", conversion_unit="head", states=False, window_size=WINDOWS.get(shape, WINDOW))


def make_model(shape: str, policy: str, where: torch.device) -> Any:
    """Random weights, and a fresh adapter unless level 0 alone is served."""
    torch.manual_seed(0)
    base = random_model(config_of(shape), torch.bfloat16 if where.type == "cuda" else torch.float32, where)
    base.generation_config.eos_token_id = None
    if policy == "0":
        return base.eval()
    with where:
        return get_peft_model(base, plan_of(shape)).to(where).eval()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--policy", default="0", help="a level such as 0 or kept:10%%, or load")
    parser.add_argument("--max-level", help="of the policy load, such as kept:10%%")
    parser.add_argument("--first-token-target", type=float, help="load: seconds to the first token that raise the level")
    parser.add_argument("--token-target", type=float, help="load: seconds per token that raise the level")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens read in a step")
    parser.add_argument("--prompt-share", type=float, default=0.4, help="of the time that prompts may take from texts that are generated")
    parser.add_argument("--max-tokens", type=int, help="longest text")
    parser.add_argument("--kv-gib", type=float, help="GiB for keys and values; else what is free")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values of kept heads")
    options = parser.parse_args(arguments)
    if options.policy != "load" and (options.max_level or options.first_token_target or options.token_target):
        parser.error(f"--max-level and targets are for --policy load, not {options.policy}: leave them out")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("dsla_hf").setLevel(logging.INFO)
    check_address(HOST, options.port)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(options.shape, options.policy, where)
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    highest = None if options.max_level is None else resolve_level(options.max_level, model.peft_config["default"], layers)
    loads = {name: getattr(options, name) for name in ("first_token_target", "token_target")} if options.policy == "load" else {}
    policy = policy_of(ServeOptions(options.shape, policy=options.policy, max_level=options.max_level, **loads), layers * kv_heads)
    sizes = EngineOptions(
        slots=options.slots,
        max_waiting=10**6,
        max_tokens=options.max_tokens,
        kv_bytes=None if options.kv_gib is None else int(options.kv_gib * 2**30),
        kv_cache_dtype=options.kv_cache_dtype,
        chunk=options.chunk,
        prompt_share=options.prompt_share,
        max_level=highest,
    )
    engine = Engine(model, policy, sizes, eos_tokens=set(), record=CudaRecording if where.type == "cuda" else None)
    served = ApiOptions(options.shape, max_new_tokens=engine.max_tokens, drain_seconds=1.0)
    run(engine, numbers_tokenizer(engine.vocab_size), served, HOST, options.port)


if __name__ == "__main__":
    main()
