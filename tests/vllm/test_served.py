"""Hybrids in vLLM say what `generate` says, token by token; skipped where vLLM is not installed (`make test-vllm` installs it)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from quantised import write_quantised
from scripts import loaded_script, loaded_with
from tiny import tiny_model_of
from transformers import AutoModelForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.vllm.checks import BIASES, SERVED_BASES, WITH_BIASES

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Below it the two best tokens are as good as equal, and the order of additions decides: what follows says nothing.
CLEAR = 1e-4
LENGTHS = (3, 15, 16, 17, 40, 133, 300)
WINDOWED = {"window_size": 16, "sink_tokens": 2}
LAYER = {"conversion_order": [1]}
# One layer as it was, one converted as a whole, and those between: pages of every size.
HEADS = {"conversion_unit": "head"}
HEADS["conversion_order"] = [(1, 2), (2, 0), (2, 2), (2, 3), (3, 0), (3, 3), (4, 0), (4, 1), (4, 2), (4, 3)]
PLANS = {
    "windowed": {**LAYER, **WINDOWED},
    "pure": {**LAYER, "window_size": 0},
    "window alone": {**LAYER, **WINDOWED, "states": False},
    "every layer": {**WINDOWED, "conversion_order": [0, 1, 2]},
    "heads": {**HEADS, **WINDOWED},
    "heads, pure": {**HEADS, "window_size": 0},
}
SIZES_OF_HEADS = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    made = {}

    def make(base="llama", kind="windowed"):
        if (base, kind) not in made:
            torch.manual_seed(0)
            sizes = SIZES | (SIZES_OF_HEADS if "heads" in kind else {})
            biases = {} if base in WITH_BIASES else dict.fromkeys(BIASES, False)
            model = tiny_model_of(base, uneven=True, **sizes, **biases)
            config = DSLAConfig(gate_rank=4, **PLANS[kind])
            merged = get_peft_model(model, config).merge_and_unload()
            with loaded_script("random_hybrids.py") as script:
                script.let_states_speak(merged)
            path = tmp_path_factory.mktemp("hybrid")
            merged.save_pretrained(path)
            made[base, kind] = path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return made[base, kind]

    return make


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def continued(model, prompt, tokens):
    """The tokens that follow, up to the first that is no clear choice."""
    ids = torch.tensor([prompt])
    asked = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **asked)
    best = torch.cat(said.logits).topk(2).values
    clear = (best[:, 0] - best[:, 1] > CLEAR).long().cumprod(0).sum()
    return said.sequences[0, len(prompt) :][:clear].tolist()


def started(path, **settings):
    script = Path(__file__).with_name("texts.py")
    return subprocess.run(
        [sys.executable, script, path, json.dumps(settings)], capture_output=True, text=True, timeout=540, env={**os.environ}
    )


def served(path, **settings):
    done = started(path, **settings)
    assert not done.returncode, done.stderr[-6000:] + done.stdout[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"texts"')))  # others are vLLM's log


def assert_equal_to_generate(model, prompts, said, tokens=40):
    expected = [continued(model, prompt, tokens) for prompt in prompts]
    varied = [len(set(text)) > 5 for text in said["texts"][0]]
    assert sum(varied) > 0.8 * len(varied), "texts that repeat one token would show nothing"
    assert sum(map(len, expected)) > 0.9 * tokens * len(prompts), "most tokens must be clear choices"
    for texts in said["texts"]:
        assert [text[: len(clear)] for text, clear in zip(texts, expected, strict=True)] == expected


@pytest.mark.parametrize("base", SERVED_BASES)
def test_a_batch_is_continued_as_generate_does(hybrid, base):
    path, model = hybrid(base)
    prompts = prompts_of(*LENGTHS)
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts))


@pytest.mark.parametrize("kind", ["pure", "window alone", "every layer", "heads", "heads, pure"])
def test_every_kind_of_layer(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS)
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts))


@pytest.mark.parametrize("kind", ["windowed", "heads"])
def test_prompts_read_in_chunks(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS)
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts, options={"max_num_batched_tokens": 48}))


@pytest.mark.parametrize("kind", ["windowed", "pure", "heads"])
def test_a_prompt_of_one_token_finds_nothing_of_earlier_texts(hybrid, kind):
    """vLLM counts its first step as a decode, in a page that others have written."""
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*[1] * 8, *[60] * 24)[::-1]
    options = {"num_gpu_blocks_override": 40, "enable_prefix_caching": False}
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts, options=options))


@pytest.mark.parametrize("kind", ["windowed", "pure", "heads"])
def test_cached_prefixes(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS, 600)
    prompts += [prompts[-1][:590] + [7, 8, 9], prompts[-2][:290] + [7, 8, 9]]
    said = served(path, prompts=prompts, rounds=2, options={"enable_prefix_caching": True})
    assert_equal_to_generate(model, prompts, said)
    assert max(said["cached"][1]) > 0, "the second round must find prefixes of the first"


@pytest.mark.parametrize("kind", ["windowed", "heads"])
def test_requests_that_make_room_and_come_back(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*[120] * 8)
    options = {"num_gpu_blocks_override": 14, "enable_prefix_caching": False, "max_model_len": 400}
    said = served(path, prompts=prompts, new_tokens=200, options=options)
    assert said["preemptions"] > 0
    assert_equal_to_generate(model, prompts, said, tokens=200)


@pytest.mark.parametrize("kind", ["windowed", "pure", "heads"])
def test_heads_divided_between_two_processes(hybrid, kind):
    """Of `heads`, ranks keep and convert different numbers of a layer, or none."""
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS)
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts, options={"tensor_parallel_size": 2}))


def test_half_of_the_heads_make_room_for_texts(hybrid):
    path, model = hybrid(kind="heads")
    said = served(path, prompts=prompts_of(3), options={"max_model_len": 2048})
    config = model.config
    of_the_base = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # bytes of a token in fp32
    # Twice as many tokens, less the states of each text.
    assert said["room"] > 1.4 * 2**30 / of_the_base


@pytest.mark.parametrize("kind", ["windowed", "heads"])
def test_compiled(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS)
    assert_equal_to_generate(model, prompts, served(path, prompts=prompts, options={"enforce_eager": False}))


@pytest.mark.parametrize("kind", ["windowed", "heads"])
def test_states_that_are_never_written_are_seen(hybrid, kind):
    path, model = hybrid(kind=kind)
    prompts = prompts_of(*LENGTHS)
    said = served(path, prompts=prompts, forget=True)
    expected = [continued(model, prompt, 40) for prompt in prompts]
    assert [text[: len(clear)] for text, clear in zip(said["texts"][0], expected, strict=True)] != expected


@pytest.mark.parametrize(("scheme", "kind"), [("int8", "pure"), ("int4", "pure"), ("int8", "heads, pure")])
def test_quantised_projections(hybrid, scheme, kind, tmp_path):
    """What is DSLA's own stays in bf16, in which vLLM's kernels for CPUs compute; with rounded activations texts are no longer the same."""
    write_quantised(hybrid(kind=kind)[0], scheme, tmp_path)
    prompts = prompts_of(*LENGTHS)
    said = served(tmp_path / "small", prompts=prompts, weights=True, options={"dtype": "bfloat16"})
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    texts = list(zip(prompts, said["texts"][0], strict=True))
    with loaded_with("vllm_gpu.py", ("random_hybrids", "reporting")) as script:
        regret = sum(sum(script.regrets(exact, *text)) for text in texts)
        script.close_states(exact)
        assert regret < 0.2 * sum(sum(script.regrets(exact, *text)) for text in texts), "far from what other states would say"
    projections = [f"model.layers.{i}.self_attn.{name}." for i in range(exact.config.num_hidden_layers) for name in ("qkv_proj", "o_proj")]
    weight = "weight" if scheme == "int8" else "weight_packed"
    assert all("int" in said["weights"][f"{projection}{weight}"] for projection in projections)
    assert {dtype for name, dtype in said["weights"].items() if ".dsla." in name} == {"torch.bfloat16"}


@pytest.mark.parametrize("base", ["olmo2", "starcoder2"])
def test_other_bases_are_refused_in_one_sentence(hybrid, base):
    path, _ = hybrid(base)
    done = started(path, prompts=prompts_of(3))
    assert done.returncode
    assert f"vLLM cannot serve a hybrid of type {base!r}: it can those of {', '.join(SERVED_BASES)};" in done.stderr + done.stdout
