"""Continues prompts with vLLM in a process of its own: python texts.py MODEL OPTIONS, where OPTIONS is a JSON dict; writes JSON in a line.

options: of `LLM`. prompts: lists of token ids. new_tokens: how many for each. rounds: how often. forget: leave states unwritten.
weights: also say the dtype of each.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or vLLM wants a NUMA node for each process of tensor parallelism
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its layers can be changed


def main(path, prompts, new_tokens=40, rounds=1, forget=False, weights=False, options=None):
    from vllm import LLM, SamplingParams

    if forget:
        from dsla_hf.vllm.mixer import DSLAMixer

        DSLAMixer._write = lambda self, slots, state: None
    settings = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8, "skip_tokenizer_init": True}
    settings |= {"disable_log_stats": False, **(options or {})}
    llm = LLM(path, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    said = [llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling) for _ in range(rounds)]
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    texts = [[list(request.outputs[0].token_ids) for request in requests] for requests in said]
    cached = [[request.num_cached_tokens for request in requests] for requests in said]
    room = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    found = {"texts": texts, "cached": cached, "preemptions": counts.get("vllm:num_preemptions", 0), "room": room}
    if weights:
        (found["weights"],) = llm.apply_model(lambda model: {name: str(x.dtype) for name, x in model.named_parameters()})
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
