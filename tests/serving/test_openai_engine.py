"""The real engine behind OpenAI's client: log-probabilities, draws, grammars and levels are the model's own; lm-eval finds what it finds
without a server."""

import json
import threading

import jsonschema
import lm_eval.tasks
import openai
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import PeftModel, get_peft_model
from scripted import every_byte_tokenizer
from server import served
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.evaluation.lm_eval import DSLALM
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app

LEVEL = 2
PROMPT = "Hello, layer"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["size", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "order", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and an adapter at level 2, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), every_byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": 4, "vocab_size": len(tokenizer) + 6, "initializer_range": 0.2, "max_position_embeddings": 4096}
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    plan = DSLAConfig(task_type="CAUSAL_LM", window_size=8, conversion_order=[2, 0, 3, 1], level=LEVEL)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(folder / "adapter"))
    return folder, tokenizer


@pytest.fixture(scope="module")
def running(made):
    folder, tokenizer = made
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter")).eval()
    engine = Engine(model, LEVEL, EngineOptions(slots=4, block_size=8, chunk=64, max_tokens=1024))
    with served(build_app(engine, tokenizer, ApiOptions("tiny", max_new_tokens=400))) as (_, address):
        yield model, engine, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address


@pytest.fixture
def complete(running):
    return lambda prompt=PROMPT, **options: running[2].completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": 12, **options}
    )


def expected_logprobs(model, ids):
    """Of each token but the first, from one pass over all."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.float().log_softmax(-1)


def test_logprobs_are_those_of_a_forward_pass(running, made, complete):
    model, tokenizer = running[0], made[1]
    choice = complete(temperature=1.0, seed=4, echo=True, logprobs=3, extra_body={"ignore_eos": True, "top_k": 40}).choices[0]
    prompt = tokenizer(PROMPT)["input_ids"]
    assert len(choice.logprobs.tokens) == len(prompt) + 12
    echoed = complete(echo=True, logprobs=3, max_tokens=0).choices[0]
    assert echoed.text == PROMPT
    expected = expected_logprobs(model, prompt)
    for at, (token, top) in enumerate(zip(echoed.logprobs.token_logprobs[1:], echoed.logprobs.top_logprobs[1:], strict=True)):
        assert token == pytest.approx(float(expected[at, prompt[at + 1]]), abs=1e-4)
        values = expected[at].topk(3).values.tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(values, abs=1e-4)
    assert choice.logprobs.token_logprobs[: len(prompt)] == pytest.approx(echoed.logprobs.token_logprobs, abs=1e-5)


def test_a_seed_says_what_is_drawn_and_choices_differ(complete):
    options = {"temperature": 1.0, "seed": -(2**63), "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    texts = [choice.text for choice in complete(n=4, **options).choices]
    assert [choice.text for choice in complete(n=4, **options).choices] == texts and len(set(texts)) == 4
    assert complete(**{**options, "seed": -(2**63) + 2}).choices[0].text == texts[2]  # alone, too


def test_bias_stops_and_least_lengths(made, complete):
    eos, x = made[1].eos_token_id, made[1]("x")["input_ids"][0]
    assert complete(temperature=0, logit_bias={str(x): 100}).choices[0].text == "x" * 12
    ended = complete(temperature=0, logit_bias={str(eos): 100}, extra_body={"min_tokens": 3}).choices[0]
    assert ended.finish_reason == "stop"
    ended = complete(logit_bias={str(x): 100}, extra_body={"stop_token_ids": [x]})
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 0)


def test_levels_of_requests(running, complete):
    levels = complete(extra_body={"level": LEVEL}).choices[0].levels
    assert levels == [[len(PROMPT), LEVEL]]
    with pytest.raises(openai.BadRequestError, match="level 1 cannot be kept") as refused:
        complete(extra_body={"level": 1})
    assert refused.value.param == "level"


def test_a_random_model_follows_grammars_and_calls_tools(running, complete):
    client = running[2]
    plain, failures = complete(temperature=0, max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text, []

    def ask(seed):
        try:
            options = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "hi"}],
                "temperature": 1.0,
                "seed": seed,
                "max_tokens": 390,
            }
            form = {
                "type": "json_schema",
                "json_schema": {"name": "size", "schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}},
            }
            answer = client.chat.completions.create(**options, response_format=form).choices[0]
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.message.content), SCHEMA)
            answer = client.chat.completions.create(**options, tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0]
            if answer.finish_reason == "tool_calls":  # space is free in JSON, and this model likes it
                jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), SCHEMA)
            word = client.completions.create(model="tiny", prompt="x", seed=seed, extra_body={"guided_choice": ["yes", "no", "perhaps"]})
            assert word.choices[0].text in ("yes", "no", "perhaps")
            # One that follows nothing, beside them, is as it is alone.
            assert complete(temperature=0, max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text == plain
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# --- lm-eval ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bottles(tmp_path, monkeypatch):
    """A task with choices."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True, raising=False)
    docs = [
        {"query": f"{number} green bottles hang on the", "choices": [" wall", " tree", " big bus"], "gold": number % 3}
        for number in range(8)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "bottles",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    }
    (tmp_path / "bottles.yaml").write_text(json.dumps(task))
    every = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda *args, **kwargs: every(*args, **{**kwargs, "include_defaults": False}))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(manager, model, model_args):
    found = simple_evaluate(model=model, model_args=model_args, tasks=["bottles"], bootstrap_iters=0, task_manager=manager, device="cpu")
    return found["results"]["bottles"], [sample["filtered_resps"] for sample in found["samples"]["bottles"]]


def test_lm_eval_finds_over_http_what_it_finds_without(running, made, bottles):
    pytest.importorskip("tenacity", reason="lm-eval's client needs tenacity (pip install tenacity)")
    assert DSLALM  # registered
    folder, address = made[0], running[3]
    metrics, answers = evaluated(bottles, "dsla", f"pretrained={folder / 'base'},peft={folder / 'adapter'},level={LEVEL}")
    arguments = f"model=tiny,base_url={address}/v1/completions,tokenizer={folder / 'base'}"
    found_metrics, found = evaluated(bottles, "local-completions", arguments)
    assert {name: value for name, value in found_metrics.items() if "," in name} == {n: v for n, v in metrics.items() if "," in n}
    flat = [(float(logprob), greedy) for sample in answers for logprob, greedy in sample]
    found_flat = [(float(logprob), greedy) for sample in found for logprob, greedy in sample]
    assert [greedy for _, greedy in found_flat] == [greedy for _, greedy in flat]
    assert [logprob for logprob, _ in found_flat] == pytest.approx([logprob for logprob, _ in flat], abs=1e-4)
    assert len({logprob for logprob, _ in flat}) > 20
