"""The HTTP server: OpenAI's own client, broken requests, limits, disconnects, and an end that loses nothing."""

import asyncio
import itertools
import json
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
import torch
from head_layers import ORDER
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from server import byte_tokenizer, served

from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.text import TextStream, decoder
from dsla_hf.serving.http.api import ApiOptions, build_app

LEVEL = 2
PROMPT = "Hello, layer"


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tuned(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


@pytest.fixture
def start(tuned, tokenizer):
    """Factory of a running server: `with start(slots=2, api_key="k") as (server, address)`."""

    def make(**changes):
        api = {name: changes.pop(name) for name in ("api_key", "max_body", "max_new_tokens", "allow_origins") if name in changes}
        engine = Engine(tuned, LEVEL, EngineOptions(**{"slots": 4, "block_size": 8, "chunk": 64, "max_tokens": 512, **changes}))
        return served(build_app(engine, tokenizer, ApiOptions("tiny", **{"max_new_tokens": 400, **api})))

    return make


@pytest.fixture
def running(start):
    with start() as (server, address):
        yield server, address
        engine = server.engine
        deadline = time.monotonic() + 10
        while engine.busy and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.busy and engine.memory.pool.free_blocks == engine.memory.pool.num_blocks, "something leaked"


def client(address, **options):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, **options)


def alone_tokens(tuned, tokenizer, text, tokens):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tuned.set_level(LEVEL)
    with torch.no_grad():
        out = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def alone(tuned, tokenizer, text, tokens):
    return decoded(tokenizer, alone_tokens(tuned, tokenizer, text, tokens))


def post(address, body, route="completions", **options):
    if isinstance(body, dict):
        body = json.dumps(body)
    return httpx.post(f"{address}/v1/{route}", content=body, headers={"Content-Type": "application/json"}, timeout=30, **options)


# --- answers ----------------------------------------------------------------------------------------------------


def test_completions_of_the_openai_client(running, tuned, tokenizer):
    _, address = running
    expected = alone(tuned, tokenizer, PROMPT, 30)
    ask = client(address).completions.create
    whole = ask(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(tokenizer(PROMPT)["input_ids"]), 30)
    ids = tokenizer(PROMPT)["input_ids"]
    assert ask(model="tiny", prompt=ids, max_tokens=30, temperature=0).choices[0].text == expected
    chunks = list(ask(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected and len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 30


def test_chats_of_the_openai_client(running, tuned, tokenizer):
    _, address = running
    expected = alone(tuned, tokenizer, "user: hi\n", 20)
    ask = client(address).chat.completions.create
    messages = [{"role": "user", "content": "hi"}]
    whole = ask(model="tiny", messages=messages, max_tokens=20, temperature=0)
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    chunks = list(ask(model="tiny", messages=parts, max_completion_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert len(ask(model="tiny", messages=messages, seed=1, temperature=1.0, max_tokens=5).choices[0].message.content) <= 5


def test_stop_strings_end_a_text_before_them(running, tuned, tokenizer):
    server, address = running
    expected = alone(tuned, tokenizer, PROMPT, 30)
    stop = expected[10:13]
    for stream in (False, True):
        answer = client(address).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=300, temperature=0, stop=["never there", stop], stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected[: expected.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_models_health_status_metrics_and_page(running):
    server, address = running
    assert [model.id for model in client(address).models.list()] == ["tiny"]
    post(address, {"model": "tiny", "prompt": PROMPT, "max_tokens": 4})
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    status = httpx.get(f"{address}/status").json()
    assert status["level"] == LEVEL and status["finished"]["length"] == 1 and status["changes"][0]["reason"]
    metrics = httpx.get(f"{address}/metrics").text
    assert 'dsla_generated_tokens_total{level="2"} 4.0' in metrics
    assert "dsla_level 2.0" in metrics and 'dsla_requests_total{finish="length"} 1.0' in metrics
    assert "dsla_seconds_to_first_token_count 1.0" in metrics
    page = httpx.get(f"{address}/")
    assert page.headers["content-type"].startswith("text/html") and "http" not in page.text.replace("http://www.w3.org", "")


def test_levels_in_heads_are_shown_with_what_is_kept(tiny_model, adapter_model, tokenizer):
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=ORDER)
    engine = Engine(model, "kept:3", EngineOptions(slots=2, block_size=8, max_tokens=256))
    with served(build_app(engine, tokenizer, ApiOptions("tiny"))) as (_, address):
        post(address, {"model": "tiny", "prompt": PROMPT, "max_tokens": 4})
        status = httpx.get(f"{address}/status").json()
        shown = {name: status[name] for name in ("level", "unit", "units", "kept", "layers", "ladder")}
        assert shown == {"level": 5, "unit": "head", "units": 8, "kept": 3, "layers": 4, "ladder": [0, 1, 2, 3, 4, 5]}
        metrics = httpx.get(f"{address}/metrics").text
    assert "dsla_level 5.0" in metrics and "dsla_kept 3.0" in metrics and "KV heads that are DSLA" in metrics
    assert 'dsla_generated_tokens_total{level="5"} 4.0' in metrics


def test_two_hundred_clients_at_once_of_whom_some_leave(start, tuned, tokenizer):
    """Each answer is the text of `generate` alone, streamed or not; who leaves in mid-stream has heard its beginning."""
    prompts = ["Hello, layer", "x", "a b c " * 15, "The quick brown fox", "state"]
    longest = [alone_tokens(tuned, tokenizer, prompt, 20) for prompt in prompts]  # greedy: shorter texts are its beginnings
    texts = [{tokens: decoded(tokenizer, ids[:tokens]) for tokens in range(4, 21)} for ids in longest]

    async def ask(client, number):
        prompt, tokens = prompts[number % 5], 4 + number % 17
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        if number % 2:
            return (await client.completions.create(**body)).choices[0].text
        leaves, text = number % 20 == 0, ""
        body["max_tokens"] = 300 if leaves else tokens
        async with await client.completions.create(**body, stream=True) as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                if leaves and len(text) >= 3:
                    break
        return text

    async def ask_all(address):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    with start(slots=16) as (server, address):
        answers = asyncio.run(ask_all(address))
        engine = server.engine
        wait_for(lambda: not engine.busy)
        assert engine.memory.pool.free_blocks == engine.memory.pool.num_blocks
        assert sum(engine.finished.values()) == 200 and engine.finished["error"] == 0 and engine.finished["cancelled"] >= 5
    for number, answer in enumerate(answers):
        tokens = 4 + number % 17
        assert texts[number % 5][tokens].startswith(answer) if number % 20 == 0 else answer == texts[number % 5][tokens]


# --- limits and broken requests -----------------------------------------------------------------------------------

GOOD = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
BAD = [
    ('{"model": "tiny", "prompt"', 400, ""),
    ("\xff\xfe", 400, ""),
    ("[" * 5000 + "]" * 5000, 400, ""),
    ("3", 400, ""),
    ({**GOOD, "prompt": 5}, 400, "prompt"),
    ({**GOOD, "prompt": ""}, 400, "empty"),
    ({**GOOD, "prompt": []}, 400, "empty"),
    ({**GOOD, "prompt": [-1]}, 400, "0 to 96"),
    ({**GOOD, "prompt": [97]}, 400, "0 to 96"),
    ({**GOOD, "prompt": ["a", 3]}, 400, "prompt"),
    ({**GOOD, "max_tokens": -3}, 400, "max_tokens"),
    ({**GOOD, "max_tokens": 401}, 400, "limit of 400"),
    ({**GOOD, "max_tokens": 10**30}, 400, "limit of 400"),
    ({**GOOD, "max_tokens": "3"}, 400, "max_tokens"),
    ({**GOOD, "prompt": "a" * 600}, 400, "512 tokens"),
    ({**GOOD, "temperature": -1}, 400, "temperature"),
    (json.dumps({**GOOD, "temperature": float("nan")}), 400, "temperature"),
    ({**GOOD, "top_p": 0}, 400, "top_p"),
    ({**GOOD, "n": 0}, 400, "greater than or equal to 1, got 0"),
    ({**GOOD, "logprobs": -1}, 400, "logprobs"),
    ({**GOOD, "stop": [""]}, 400, "stop"),
    ({**GOOD, "stop": ["a"] * 200}, 400, "stop"),
    ({**GOOD, "seed": 2**64}, 400, "seed"),
    ({**GOOD, "model": "gpt-\ud800"}, 404, "no model"),
    ({**GOOD, "prompt": "\ud800"}, 400, ""),
    ({"model": "tiny"}, 400, "prompt"),
]


@pytest.fixture(scope="module")
def module_server():
    """One server for all broken requests."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsla_hf import DSLAConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), DSLAConfig(task_type="CAUSAL_LM", window_size=8)).eval()
    engine = Engine(model, 1, EngineOptions(slots=2, max_tokens=512, block_size=8))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny", max_new_tokens=400, max_body=20_000))) as (server, address):
        yield server, address


@pytest.mark.parametrize("body, status, words", BAD)
def test_broken_requests_get_an_error_that_says_what(module_server, body, status, words):
    _, address = module_server
    answer = post(address, body.encode("latin-1") if isinstance(body, str) else body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert post(address, GOOD).status_code == 200


def test_other_errors(module_server):
    _, address = module_server
    assert post(address, {**GOOD, "prompt": "a" * 30_000}).status_code == 413

    def endless():
        for _ in range(100):
            yield b"[" * 1000

    assert post(address, endless()).status_code == 413
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    assert httpx.get(f"{address}/nothing").json()["error"]["message"] == "Not Found"
    bad = {"model": "tiny", "messages": [{"role": "bad", "content": "x"}]}
    answer = post(address, bad, "chat/completions")
    assert answer.status_code == 400 and "no such role" in answer.json()["error"]["message"]
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "hi"):
        assert post(address, {"model": "tiny", "messages": messages}, "chat/completions").status_code == 400


def test_errors_name_the_field_and_what_it_is(module_server):
    _, address = module_server
    for body, param, code, words in (
        ({**GOOD, "prompt": "a" * 600}, "prompt", "context_length_exceeded", "has 600 tokens"),
        ({**GOOD, "prompt": "a" * 4000}, "prompt", "context_length_exceeded", "4,000 characters"),
        ({**GOOD, "model": "other"}, "model", "model_not_found", "no model 'other'"),
        ({**GOOD, "best_of": 7}, "best_of", None, "best_of is not supported"),
        ({**GOOD, "stop": [3]}, "stop", None, "stop"),
        ({**GOOD, "max_tokens": 401}, "max_tokens", None, "max_tokens 401"),
    ):
        error = post(address, body).json()["error"]
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
        assert words in error["message"] and "Value error" not in error["message"]
    for body, words in (
        (b"", "the body is empty: send JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"model": "\xff"}', "the body is no UTF-8 (byte 11)"),
        (b"[" * 10_000, "nested too deep"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "4300 digits"),
    ):
        answer = post(address, body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    broken = post(address, b'{"model": ').json()["error"]
    assert broken["message"].startswith("the body is no JSON") and broken["param"] is None


def test_a_model_is_told_of_by_its_name(module_server):
    _, address = module_server
    found = httpx.get(f"{address}/v1/models/tiny").json()
    assert found == httpx.get(f"{address}/v1/models").json()["data"][0] and found["id"] == "tiny"
    assert httpx.get(f"{address}/v1/models/a/b").json()["error"]["code"] == "model_not_found"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert client.models.retrieve("tiny").id == "tiny"


def test_tokens_of_a_text_and_back(module_server):
    _, address = module_server

    def ask(path, body):
        return httpx.post(f"{address}/{path}", json=body)

    found = ask("tokenize", {"prompt": "hello"}).json()
    assert found["count"] == 5 == len(found["tokens"]) and found["max_model_len"] == 512
    assert ask("detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hello"}
    messages = [{"role": "user", "content": "hi"}]
    chat = ask("tokenize", {"model": "tiny", "messages": messages}).json()["tokens"]
    assert chat == byte_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for path, body in (
        ("tokenize", {}),
        ("tokenize", {"prompt": "a", "messages": messages}),
        ("tokenize", {"prompt": "a" * 4000}),
        ("detokenize", {"tokens": [97]}),
        ("detokenize", {"tokens": [5] * 513}),
    ):
        assert ask(path, body).status_code == 400
    assert ask("tokenize", {"prompt": "a", "model": "other"}).status_code == 404


@pytest.mark.parametrize("path", ["", "health", "status", "metrics", "v1/models", "v1/models/tiny"])
def test_head_answers_without_a_body(module_server, path):
    _, address = module_server
    answer = httpx.head(f"{address}/{path}")
    assert answer.status_code == 200 and not answer.content


@pytest.mark.parametrize(
    "headers, words",
    [
        ({}, "a body without a type is not taken: send Content-Type: application/json"),
        ({"content-type": "text/plain"}, "a body of the type text/plain is not taken"),
        ({"content-type": "application/x-www-form-urlencoded"}, "Content-Type: application/json"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "Content-Encoding gzip is not taken"),
    ],
)
def test_bodies_of_another_kind_are_refused_by_name(module_server, headers, words):
    _, address = module_server
    answer = httpx.post(f"{address}/v1/completions", content=json.dumps(GOOD), headers=headers)
    assert answer.status_code == 415 and words in answer.json()["error"]["message"]
    good = {"content-type": "application/json; charset=utf-8"}
    assert httpx.post(f"{address}/v1/completions", content=json.dumps(GOOD), headers=good).status_code == 200


def test_web_pages_may_ask_where_they_are_allowed_to(start):
    asking = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with start(api_key="secret", allow_origins=("https://example.org",)) as (_, address):
        before = httpx.options(f"{address}/v1/completions", headers=asking)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://example.org"
        refused = httpx.post(f"{address}/v1/completions", json=GOOD, headers={"Origin": "https://example.org"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(f"{address}/v1/completions", headers={**asking, "Origin": "https://example.com"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        assert httpx.post(f"{address}/tokenize", json={"prompt": "a"}).status_code == 401
    with pytest.raises(ValueError, match="an allowed origin is a scheme and a host"):
        ApiOptions("tiny", allow_origins=("example.org/page",))


# What is right or wrong by what else there is, in the request or the model.
HANGING = {"tools", "tool_choice", "top_logprobs", "min_tokens", "level", "logit_bias", "stop_token_ids", "add_generation_prompt"}
HANGING |= {"response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template_kwargs"}

PLAIN = {"prompt": "ab", "messages": [{"role": "user", "content": "ab"}], "input": "ab"}


@pytest.mark.parametrize("mode", GenerationMode)
def test_requests_made_from_the_schema_never_break_the_server(module_server, mode):
    """Every route, with what the server's own schema allows, and with what it does not."""
    schema, answered = schemathesis.openapi.from_url(f"{module_server[1]}/openapi.json"), {}
    count = itertools.count()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing of it can be wrong

        @settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # else nothing comes past it
                for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("max_output_tokens", 3), ("n", 2)):
                    if isinstance(case.body.get(name), int):
                        case.body[name] = min(case.body[name], most)
                if next(count) % 2 and mode is GenerationMode.POSITIVE:  # by chance alone hardly any would fit together
                    case.body = {name: PLAIN.get(name, value) for name, value in case.body.items() if name not in HANGING}
            answer = case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])
            answered.setdefault(operation.path, set()).add(answer.status_code)  # noqa: B023 (called at once)

        check()
    routes = {"/v1/completions", "/v1/chat/completions"}
    assert all(answered[route] & ({200} if mode is GenerationMode.POSITIVE else {400}) for route in routes), answered
    assert mode is GenerationMode.NEGATIVE or answered.keys() > routes


def test_random_bodies_never_break_the_server(module_server):
    """Values of every kind in every field: an answer or a 4xx, never a 5xx."""
    _, address = module_server
    draw = random.Random(0)
    values = [None, True, -1, 0, 1, 2.5, 1e308, 2**70, "", "x", "é\u0000\U0001f600", [], [1], ["x"], [[1]], {}, {"a": 1}]
    fields = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "seed", "stream_options", "tools"]
    with httpx.Client(timeout=30) as http:
        for _ in range(300):
            body = {**GOOD, "messages": [{"role": "user", "content": "x"}]}
            for field in draw.sample(fields, draw.randint(1, 3)):
                body[field] = draw.choice(values)
            route = draw.choice(["completions", "chat/completions"])
            answer = http.post(f"{address}/v1/{route}", json={**body, "max_tokens": 2} if draw.random() < 0.5 else body)
            assert answer.status_code < 500, (body, answer.text)


def test_keys_are_asked_for(start):
    with start(api_key="secret") as (_, address):
        assert post(address, GOOD).status_code == 401
        assert post(address, GOOD, params={"key": "secret"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            client(address).models.list()
        known = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert known.completions.create(**GOOD).choices[0].finish_reason == "length"
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_full_queue_answers_503_with_retry_after(start):
    with start(slots=1, max_waiting=1) as (server, address):
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: post(address, {**GOOD, "max_tokens": 60, "ignore_eos": True}), range(6)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)
        assert any(answer.status_code == 200 for answer in answers) and all(answer.status_code in (200, 503) for answer in answers)


# --- clients that leave, servers that end ---------------------------------------------------------------------------


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(running, stream):
    server, address = running
    engine = server.engine
    body = {**GOOD, "max_tokens": 400, "stream": stream, "ignore_eos": True}
    slow = threading.Event()
    step = engine.runner.decode
    engine.runner.decode = lambda *args: (slow.wait(0.02), step(*args))[1]
    if stream:
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.5)
    wait_for(lambda: not engine.busy)
    assert engine.finished["cancelled"] == 1 and engine.generated_tokens < 300


def test_a_slow_reader_holds_up_nobody(running, tuned, tokenizer):
    server, address = running
    with httpx.stream("POST", f"{address}/v1/completions", json={**GOOD, "max_tokens": 200, "stream": True, "temperature": 0}) as slow:
        assert post(address, {**GOOD, "temperature": 0}).json()["choices"][0]["text"] == alone(tuned, tokenizer, PROMPT, 3)
        lines = [line.removeprefix("data: ") for line in slow.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == alone(tuned, tokenizer, PROMPT, 200)


def test_an_error_inside_a_step_is_a_500_and_the_server_goes_on(running, monkeypatch):
    server, address = running
    engine = server.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *args: 1 / 0)
        answer = post(address, GOOD)
        assert answer.status_code == 500 and "log" in answer.json()["error"]["message"]
        streamed = post(address, {**GOOD, "stream": True})  # its first token came before the error
        assert streamed.status_code == 200 and "server_error" in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    assert post(address, GOOD).status_code == 200


def test_a_signal_drains_under_load(start, tuned, tokenizer):
    with start() as (server, address):
        engine = server.engine
        body = {**GOOD, "max_tokens": 50, "temperature": 0, "ignore_eos": True}
        step = engine.runner.decode
        engine.runner.decode = lambda *args: (time.sleep(0.005), step(*args))[1]
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(post, address, body) for _ in range(6)]
            wait_for(lambda: engine.generated_tokens > 10 and len(engine.scheduler.running) + len(engine.scheduler.waiting) == 6)
            server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: engine.draining)
            late = post(address, body)
            assert late.status_code == 503 and late.headers["retry-after"] and httpx.get(f"{address}/health").status_code == 503
            texts = {answer.result().json()["choices"][0]["text"] for answer in answers}
        assert texts == {alone(tuned, tokenizer, PROMPT, 50)}
        wait_for(lambda: server.should_exit)


# --- text -------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, tokens, **options):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_a_fast_tokenizer_is_decoded_without_its_wrapper(tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer("größer 😀, ok .")["input_ids"], tokenizer.eos_token_id]
    assert decoder(tokenizer)(ids) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    class Own(type(tokenizer)):
        def decode(self, tokens, **options):
            return "its own"

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert decoder(own)(ids) == "its own"


@pytest.mark.parametrize("text", ["plain", "größer 😀 ok", "日本語", "end\ufffd"])
def test_streamed_text_is_the_decoded_text(text):
    stream = TextStream(Bytes())
    pieces = [stream.add(byte) for byte in text.encode()] + [stream.end()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_text_cut_within_a_character_and_stop_strings_across_tokens():
    stream = TextStream(Bytes())
    assert "".join([stream.add(byte) for byte in "a😀".encode()[:-1]] + [stream.end()]) == "a\ufffd"
    stream = TextStream(Bytes(), ("STOP", "Sx"))
    pieces = [stream.add(byte) for byte in b"go S STO STOP more"]
    assert "".join(pieces) == "go S STO " and stream.stopped and stream.end() == ""
    stream = TextStream(Bytes(), ("STOP",))
    assert "".join([*(stream.add(byte) for byte in b"an STO"), stream.end()]) == "an STO"
