"""Grammars, tools, stop strings, log-probabilities, penalties and several choices beside drafts, prefixes and levels that move: each answer
is what it would be alone at its history of levels, follows its schema, and leaves nothing behind."""

import json
import random
import threading
import time
from dataclasses import replace

import httpx
import jsonschema
import pytest
import torch
from engine_texts import assert_empty
from scripted import every_byte_tokenizer
from server import served
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.http.grammar import GrammarConstraint

SIZES = {"block_size": 8, "chunk": 64, "kv_bytes": 2**22, "max_tokens": 1024, "hold": 0.0, "busy_hold": 0.0, "cool_down": 0.0}
BEGINNINGS = ["state layer window head level token text ", "layer head state gate block "]
# Short, for every token is a byte.
CHAT = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
STOPS = ["e", "st", "to", "1", "}", "ab"]


@pytest.fixture(scope="module")
def tokenizer():
    return every_byte_tokenizer(["<tool_call>", "</tool_call>"], CHAT)


@pytest.fixture(scope="module")
def model(tokenizer):
    from peft import get_peft_model

    from dsla_hf import DSLAConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": 4, "vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 2048}
    plan = DSLAConfig(task_type="CAUSAL_LM", window_size=8, conversion_order=[2, 0, 3, 1])
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id)), plan).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def schema_of(draws, depth=0):
    """Of one value; of an object at the top."""
    kinds = [
        lambda: {"enum": draws.sample(["red", "a b", 1, None, True], draws.randint(1, 3))},
        lambda: {"type": "integer", "minimum": draws.randint(-9, 0), "maximum": draws.randint(1, 99)},
        lambda: {"type": "string", "maxLength": draws.randint(0, 5)},
        lambda: {"type": "array", "items": schema_of(draws, depth + 1), "maxItems": 2},
        lambda: {"anyOf": [schema_of(draws, depth + 1) for _ in range(2)]},
    ]
    if depth > 0:
        return draws.choice(kinds[: 3 if depth > 2 else 5])()
    properties = {name: schema_of(draws, 1) for name in draws.sample(["size", "count", "tags"], draws.randint(1, 2))}
    form = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {**form, "x-guidance": {"whitespace_flexible": False}}  # else a random model writes space without end


def request_of(draws, number):
    """Route, body, and whether its client leaves."""
    left = number % 6 == 5
    prompt = draws.choice(BEGINNINGS) + f"{draws.choice(['text', 'head'])} {draws.randint(0, 9)}"
    body = {"model": "m", "stream": left or draws.random() < 0.5, "temperature": draws.choice([0, 0.7, 1.3])}
    if body["temperature"]:
        body |= {"seed": draws.randrange(2**62), **draws.choice([{}, {"top_p": 0.9}, {"top_k": 12}])}
    body |= draws.choice([{}, {}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.2}, {"logit_bias": {"50": 3}}])
    body |= {"n": draws.randint(2, 3)} if draws.random() < 0.3 else {}
    body |= {"level": draws.randint(0, 4)} if draws.random() < 0.2 else {}
    kind = number % 5
    if kind < 2:
        more = {"guided_regex": "[a-c]{3,9}z"} if kind else {"stop": draws.sample(STOPS, 2), "echo": draws.random() < 0.3}
        return "completions", {**body, "prompt": prompt, "max_tokens": 40, "logprobs": draws.randint(0, 3), **more}, left
    body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": 90, "logprobs": True}
    if kind == 2:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema_of(draws)}}
        return "chat/completions", {**body, "response_format": form}, left
    tools = [{"type": "function", "function": {"name": name, "parameters": schema_of(draws)}} for name in ("order", "see")]
    forced = {"type": "function", "function": {"name": "see"}} if kind == 3 else "required"
    return "chat/completions", {**body, "tools": tools, "tool_choice": forced, "parallel_tool_calls": False}, left


def heard(client, route, body, left):
    """Choices by index: text, calls, why it ended."""
    found = {}

    def take(answer):
        assert "error" not in answer, answer
        for choice in answer["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "calls": {}, "finish": None})
            said = choice.get("message") or choice.get("delta") or {}
            one["text"] += choice.get("text") or said.get("content") or ""
            for place, call in enumerate(said.get("tool_calls") or ()):
                whole = one["calls"].setdefault(call.get("index", place), ["", ""])
                whole[0] += call["function"].get("name") or ""
                whole[1] += call["function"].get("arguments") or ""
            one["finish"] = choice.get("finish_reason") or one["finish"]

    if not body["stream"]:
        answer = client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        take(answer.json())
        return found
    with client.stream("POST", route, json=body) as stream:
        assert stream.status_code == 200
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        for number, line in enumerate(lines):
            take(json.loads(line[6:]))
            if left and number > 8:
                return {}
    return found


def check(body, choices):
    """What an answer must be whatever the model says."""
    assert not choices or sorted(choices) == list(range(body.get("n", 1)))
    for one in choices.values():
        assert one["finish"] is not None
        if "stop" in body and not body.get("echo"):
            assert not any(stop in one["text"] for stop in body["stop"])
        if "response_format" in body and one["finish"] == "stop":
            jsonschema.validate(json.loads(one["text"]), body["response_format"]["json_schema"]["schema"])
        if "tools" in body and one["finish"] != "length":
            assert one["finish"] == "tool_calls" and len(one["calls"]) == 1
            ((name, arguments),) = one["calls"].values()
            assert name == "see" or body["tool_choice"] == "required"
            (form,) = (tool["function"]["parameters"] for tool in body["tools"] if tool["function"]["name"] == name)
            jsonschema.validate(json.loads(arguments), form)


class Wandering:
    """Another level at random times."""

    def __init__(self):
        self.draws, self.level, self.until = random.Random(3), 0, 0.0

    def __call__(self, stats):
        if time.monotonic() >= self.until:
            self.level, self.until = self.draws.randint(0, 4), time.monotonic() + self.draws.uniform(0.02, 0.3)
        return self.level


@pytest.mark.parametrize(
    "drafts", [{"draft_level": 4, "draft_tokens": 3}, {"draft_lookup": True, "draft_tokens": 4}], ids=["level", "lookup"]
)
def test_each_answer_is_what_it_is_alone(model, tokenizer, drafts):
    engine = Engine(model, Wandering(), EngineOptions(slots=4, **SIZES, **drafts))
    asked, submit, failures = [], engine.submit, []

    def kept(prompt, max_tokens, listener, sampling=None, constraint=None, level=None, stop_strings=False):
        same = None if constraint is None else GrammarConstraint(constraint.matcher.deep_copy(), constraint.vocab_size)
        events = []

        def both(event):
            events.append(event)
            listener(event)

        request = submit(prompt, max_tokens, both, sampling, constraint, level, stop_strings)
        asked.append((request, same, events))
        return request

    engine.submit = kept
    with served(build_app(engine, tokenizer, ApiOptions("m", tool_format="hermes"))) as (_, address):

        def client(which):
            draws = random.Random(which)
            try:
                with httpx.Client(base_url=f"{address}/v1/", timeout=300) as http:
                    for number in range(which, which + 6):
                        route, body, left = request_of(draws, number)
                        check(body, heard(http, route, body, left))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=[which]) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while engine.busy and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not failures, failures[0]
    assert engine.drafts.accepted > 0 and engine.prefix_hits > 0 and engine.control.count > 1 and engine.health.failed_steps == 0
    assert_empty(engine)

    history = [(0, 0)]
    alone = Engine(
        model,
        lambda stats: max([history[0][1], *(level for at, level in history[1:] if stats.tokens >= at)]),
        EngineOptions(slots=1, prefix_reuse=False, **SIZES),
    )
    compared = 0
    for request, constraint, events in asked:
        if not request.levels or any(0 < token < len(request.prompt) for token, _ in request.history):
            continue  # it left the queue, or its prompt was read at several levels
        history[:] = request.levels
        again = []
        sampling = replace(request.sampling, seed=request.seed)
        other = alone.submit(request.prompt, request.max_tokens, again.append, sampling, constraint, request.pinned)
        while alone.busy:
            alone.step()
        same = other.tokens[: len(request.tokens)] if request.cancelled else other.tokens
        assert request.tokens == same, (request.levels, request.sampling)
        told = [(event.logprob, twin.logprob) for event, twin in zip(events, again, strict=False) if event.token is not None]
        assert all((a is None) == (b is None) and (a is None or abs(a.logprob - b.logprob) < 1e-3) for a, b in told)
        compared += 1
    assert compared > 0.7 * len(asked)


def test_answers_say_where_a_prompt_was_read_at_another_level(model, tokenizer):
    """As with lower prefixes; with that the library gives the text."""
    level, prompt = [1], BEGINNINGS[0] + "and text"
    engine = Engine(model, lambda stats: level[0], EngineOptions(slots=2, lower_prefixes=True, **SIZES))
    with served(build_app(engine, tokenizer, ApiOptions("m"))) as (_, address), httpx.Client(base_url=f"{address}/v1/", timeout=60) as http:
        body = {"model": "m", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
        (first,) = http.post("completions", json={**body, "prompt": BEGINNINGS[0]}).json()["choices"]
        assert "read_levels" not in first and first["levels"] == [[len(BEGINNINGS[0]), 1]]
        level[0] = 3
        while engine.control.level != 3:
            time.sleep(0.01)
        answer = http.post("completions", json={**body, "prompt": prompt}).json()
        (whole,) = answer["choices"]
        with http.stream("POST", "completions", json={**body, "prompt": prompt, "stream": True}) as stream:
            lines = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    given = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < given < len(prompt) and whole["levels"] == [[len(prompt), 3]] and whole["read_levels"] == [[0, 1], [given, 3]]
    assert lines[-1]["choices"][0]["read_levels"][0] == [0, 1]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model.set_level(1)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :given], use_cache=True).past_key_values
        model.set_level(3)
        out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert whole["text"] == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
