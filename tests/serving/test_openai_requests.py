"""What a request may ask for, by OpenAI's own client, of an engine whose texts are given."""

import json
import threading

import httpx
import openai
import pytest
from pydantic import ValidationError
from scripted import Scripted, every_byte_tokenizer
from server import served

from dsla_hf.serving.http import completions, formats
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.http.logprobs import completion_logprobs
from dsla_hf.serving.http.responses import ResponsesBody
from dsla_hf.serving.http.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody


@pytest.fixture(scope="module")
def server():
    tokenizer = every_byte_tokenizer()
    engine = Scripted(tokenizer)
    with served(build_app(engine, tokenizer, ApiOptions("tiny", max_new_tokens=600))) as (_, address):
        yield engine, address


@pytest.fixture
def engine(server):
    engine = server[0]
    engine.script, engine.asked = "hello", []
    return engine


@pytest.fixture
def complete(server):
    create = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0).completions.create
    return lambda prompt="ab", **options: create(model="tiny", prompt=prompt, **options)


@pytest.fixture
def chat(server):
    create = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0).chat.completions.create
    return lambda messages=({"role": "user", "content": "hi"},), **options: create(model="tiny", messages=list(messages), **options)


NESTED = json.loads('{"a":' * 150 + "{}" + "}" * 150)


def error(server, route, **body):
    # Not by httpx's own JSON, which has no halves of surrogate pairs.
    content = json.dumps({"model": "tiny", **body})
    answer = httpx.post(f"{server[1]}/v1/{route}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


# --- prompts, choices, samplings ------------------------------------------------------------------------------------


def test_prompts_of_all_kinds_and_several(engine, complete):
    ids = engine.tokenizer("ab")["input_ids"]
    engine.script = lambda prompt: prompt.upper()
    assert [choice.text for choice in complete("ab").choices] == ["AB"]
    assert [choice.text for choice in complete(ids).choices] == ["AB"]
    several = complete(["ab", "xyz"], n=2)
    assert [(choice.index, choice.text) for choice in several.choices] == [(0, "AB"), (1, "AB"), (2, "XYZ"), (3, "XYZ")]
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (5, 10)  # a prompt counts once
    assert [choice.text for choice in complete([ids, ids[:1]]).choices] == ["AB", "A"]
    texts = ["", "", "", ""]
    for chunk in complete(["ab", "xyz"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["AB", "AB", "XYZ", "XYZ"]


def test_choices_have_seeds_of_their_own(engine, complete, chat):
    largest = 2**63 - 1
    complete(seed=largest, n=3)
    assert [request.sampling.seed for request, *_ in engine.asked] == [largest, -(2**63), -(2**63) + 1]
    engine.asked.clear()
    assert [choice.index for choice in chat(seed=-5, n=16).choices] == list(range(16))
    assert [request.sampling.seed for request, *_ in engine.asked] == list(range(-5, 11))


def test_options_reach_the_engine(engine, complete, chat):
    options = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 1.5, "frequency_penalty": -2, "seed": 3}
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [5, 6], "ignore_eos": True}
    for ask in (complete, chat):
        engine.asked.clear()
        ask(**options, logit_bias={"7": -100, "8": 1.5}, max_tokens=4, extra_body={**extra, "level": 0})
        ((request, constraint, level),) = engine.asked
        assert (request.max_tokens, constraint, level) == (4, None, 0)
        found = {name: getattr(request.sampling, name) for name in (*options, *extra, "logit_bias")}
        assert found == {**options, **extra, "stop_token_ids": (5, 6), "logit_bias": ((7, -100.0), (8, 1.5))}
    engine.asked.clear()
    complete(extra_body={"top_k": -1})
    sampling = engine.asked[0][0].sampling
    assert (sampling.top_k, sampling.temperature, sampling.logprobs, sampling.prompt_logprobs) == (0, 1.0, None, None)


def test_levels_are_told_and_wrong_ones_refused(server, engine, complete, chat):
    assert complete().choices[0].levels == [[2, 0]]
    assert list(chat(stream=True))[-1].choices[0].levels == [[len("user: hi\nassistant: "), 0]]
    assert error(server, "completions", prompt="a", level=3) == {
        "message": "level must be 0, got 3",
        "type": "invalid_request_error",
        "param": "level",
        "code": None,
    }


def test_max_tokens_absent_null_and_none_at_all(engine, complete, chat):
    engine.script = "x" * 700
    assert len(complete().choices[0].text) == len(complete(max_tokens=None).choices[0].text) == 16
    assert len(chat().choices[0].message.content) == len(chat(max_tokens=None).choices[0].message.content) == 600
    long = complete("a" * 995)  # no more than there is room for
    assert len(long.choices[0].text) == 5 and long.choices[0].finish_reason == "length"
    for answer in (complete(max_tokens=0), chat(max_tokens=0), complete(max_tokens=0, echo=True)):
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 0
    assert (answer.choices[0].text, complete(max_tokens=0).choices[0].text) == ("ab", "")


def test_many_stop_strings(engine, complete):
    engine.script = "one two three"
    stops = [f"stop {number}" for number in range(127)]
    assert complete(stop=[*stops, "thr"]).choices[0].text == "one two "
    assert complete(stop=[*stops, "never"]).choices[0].text == "one two three"


def test_usage_in_streams(engine, complete, chat):
    engine.script = "four"
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1]) and chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in chat(stream=True, stream_options=options)]
    assert counts == [0, 1, 2, 3, 4, 4, 4]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_of_completions(engine, complete):
    engine.script = "hé!"
    choice = complete(logprobs=2).choices[0]
    tokens = ["h", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice.logprobs.tokens == tokens and choice.logprobs.token_logprobs == [-0.25] * 4
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 4
    assert all(top[token] == max(top.values()) == -0.25 for top, token in zip(choice.logprobs.top_logprobs, tokens, strict=True))
    alone = complete(logprobs=0).choices[0].logprobs
    assert alone.top_logprobs == [{token: -0.25} for token in tokens]  # the chosen ones alone
    chunks = list(complete(logprobs=1, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == tokens
    assert [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset] == [0, 1, 1, 2]


def test_echo_with_logprobs_as_lm_eval_asks(engine, complete):
    engine.script = "c"
    for prompt in ("ab", engine.tokenizer("ab")["input_ids"]):
        for most in (0, 1):
            choice = complete(prompt, echo=True, logprobs=1, max_tokens=most).choices[0]
            assert choice.text == ("abc" if most else "ab")
            assert choice.logprobs.tokens == (["a", "b", "c"] if most else ["a", "b"])
            assert choice.logprobs.token_logprobs == [None, -0.25, -0.25][: 2 + most]
            assert choice.logprobs.top_logprobs == [None, {"b": -0.25}, {"c": -0.25}][: 2 + most]
            assert choice.logprobs.text_offset == [0, 1, 2][: 2 + most]
    # The end of the text counts as a token there: clients take the last one away.
    engine.script = ""
    ended = complete(echo=True, logprobs=1, max_tokens=1).choices[0]
    assert ended.logprobs.tokens == ["a", "b", "</s>"] and ended.text == "ab" and ended.finish_reason == "stop"
    streamed = list(complete(["ab", "x"], echo=True, logprobs=1, max_tokens=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == 1) == "x"
    assert complete(echo=True).choices[0].logprobs is None


def test_logprobs_of_long_prompts_are_written_aside(server, engine, complete, monkeypatch):
    threads = []
    monkeypatch.setattr(
        completions, "completion_logprobs", lambda *args: (threads.append(threading.current_thread()), completion_logprobs(*args))[1]
    )
    monkeypatch.setattr(formats, "MANY", 50)
    for stream in (False, True):
        for length in (40, 60):
            answer = complete("a" * length, echo=True, logprobs=0, max_tokens=0, stream=stream)
            chunks = list(answer) if stream else [answer]
            assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == ["a"] * length
    loop = threads[0]
    assert [thread is loop for thread in threads] == [True, False, True, True, False, True]  # streams have a last, empty piece


def test_logprobs_of_chats(engine, chat):
    engine.script = "é"
    (choice,) = chat(logprobs=True, top_logprobs=3).choices
    content = choice.logprobs.content
    assert [(one.token, one.bytes, one.logprob) for one in content] == [("bytes:\\xc3", [0xC3], -0.25), ("bytes:\\xa9", [0xA9], -0.25)]
    assert [len(one.top_logprobs) for one in content] == [3, 3] and content[0].top_logprobs[0].token == content[0].token
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    chunks = list(chat(logprobs=True, stream=True))
    assert [one.bytes for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content] == [[0xC3], [0xA9]]
    assert chat().choices[0].logprobs is None


def test_no_logprobs_of_what_a_stop_string_took(engine, complete):
    engine.script = "abSTOPcd"
    for stream in (False, True):
        answer = complete(stop="STOP", logprobs=0, stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
        assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == ["a", "b"]


# --- chats ------------------------------------------------------------------------------------------------------------


def prompt_of(engine):
    return engine.tokenizer.decode(engine.asked[-1][0].prompt)


def test_messages_of_all_roles(engine, chat):
    chat(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "Ada", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ]
    )
    assert prompt_of(engine) == (
        "system: be brief\nuser Ada: one two\nassistant: <tool_call>f [('a', 1)]</tool_call>\ntool f: 3\nassistant: "
    )


def test_what_templates_are_given(server, engine, chat):
    chat(extra_body={"chat_template_kwargs": {"mood": "calm "}})
    assert prompt_of(engine) == "user: hi\ncalm assistant: "
    chat(extra_body={"add_generation_prompt": False})
    assert prompt_of(engine) == "user: hi\n"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, I"}]
    chat(messages, extra_body={"continue_final_message": True})
    assert prompt_of(engine) == "user: hi\nassistant: well, I"
    hi = [{"role": "user", "content": "hi"}]
    for name in ("chat_template", "tokenize", "messages"):
        found = error(server, "chat/completions", messages=hi, chat_template_kwargs={name: "x"})
        assert found["param"] == "chat_template_kwargs" and f"cannot set {name}" in found["message"]
    found = error(server, "chat/completions", messages=hi, continue_final_message=True, add_generation_prompt=True)
    assert found["param"] == "add_generation_prompt"


# --- streams ----------------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def choices_of(answers):
    """Content, calls, reason of the end and tokens of log-probabilities by choice, of an answer or of the pieces of one."""
    found = {}
    for answer in answers:
        for choice in answer["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "calls": {}, "finish": None, "tokens": []})
            said = choice.get("message") or choice.get("delta") or {}
            one["text"] += choice.get("text") or said.get("content") or ""
            for number, call in enumerate(said.get("tool_calls", [])):
                number = call.get("index", number)
                one["calls"][number] = one["calls"].get(number, "") + call["function"].get("name", "") + call["function"]["arguments"]
            logprobs = choice["logprobs"] or {}
            one["tokens"] += logprobs.get("tokens", []) + [entry["token"] for entry in logprobs.get("content", [])]
            one["finish"] = choice["finish_reason"] or one["finish"]
    return found


@pytest.mark.parametrize("script", ["hello", "h\u00e9\U0001f600", "", "go STO STOP on", f"so {CALL}{CALL}", '<tool_call>{"name"'])
def test_streamed_pieces_make_the_whole_answer(server, engine, script):
    engine.script = script
    for route, bodies in (
        ("completions", [{"n": 2, "logprobs": 1}, {"echo": True, "logprobs": 0, "max_tokens": 3}, {"stop": "STOP", "logprobs": 2}]),
        (
            "chat/completions",
            [{"tools": TOOLS, "n": 2, "logprobs": True}, {"tools": TOOLS, "stop": ["STOP"]}, {"max_tokens": 20, "tools": TOOLS}],
        ),
    ):
        asked = {"prompt": ["ab", "c"]} if route == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
        for body in bodies:
            body = {"model": "tiny", "max_tokens": 200, **asked, **body}
            whole = httpx.post(f"{server[1]}/v1/{route}", json=body).json()
            lines = httpx.post(f"{server[1]}/v1/{route}", json={**body, "stream": True}).text.split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""]
            assert choices_of(json.loads(line.removeprefix("data: ")) for line in lines[:-2]) == choices_of([whole])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_harmless_names_are_taken(engine, complete, chat):
    harmless = {"user": "ada", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True}
    assert chat(**harmless).choices and complete(user="ada", best_of=1, suffix=None, extra_body={"store": True}).choices


@pytest.mark.parametrize(
    "change, param, words",
    [
        ({"best_of": 2}, "best_of", "best_of is not supported"),
        ({"suffix": "end"}, "suffix", "suffix is not supported"),
        ({"beams": 3}, "beams", "beams is not known here: leave it out"),
        ({"n": 17}, "n", "less than or equal to 16, got 17"),
        ({"n": 16, "prompt": ["a"] * 17}, "prompt", "17 prompts with n 16 are 272 texts, more than the 256"),
        ({"prompt": [[1], "a"]}, "prompt", "prompt: give a text, a list of token ids, or a list of one of these"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": "a" * 1000}, "prompt", "the prompt has 1,000 tokens"),
        ({"prompt": "a" * 990, "max_tokens": 20}, "prompt", "990 prompt tokens and max_tokens 20"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids for keys, got 'x'"),
        ({"logit_bias": {"07": 1}}, "logit_bias", "token ids for keys, got '07'"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "the token 5000, ids go from 0 to 258"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "got 101"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "the token -1"),
        ({"stop": ["a"] * 129}, "stop", "at most 128"),
        ({"seed": 2**63}, "seed", "got 9223372036854775808"),
        ({"min_p": 1.5}, "min_p", "got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0, got 0"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens", "min_tokens 5 is more than the 3 tokens asked for"),
        ({"max_tokens": 601}, "max_tokens", "max_tokens 601 is more than this server's limit of 600"),
        ({"temperature": 3}, "temperature", "less than or equal to 2, got 3"),
        ({"prompt": "ab\ud800"}, "prompt", "\\ud800 is half of a surrogate pair"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "at most 1024 tokens can have one, got 1025"),
        ({"guided_json": NESTED}, "guided_json", "nested more than 100 deep"),
    ],
)
def test_completions_that_are_refused(server, engine, change, param, words):
    found = error(server, "completions", **{"prompt": "a", **change})
    assert found["param"] == param and words in found["message"] and "Value error" not in found["message"]


@pytest.mark.parametrize(
    "change, param, words",
    [
        ({"messages": [{"role": "user", "content": "a" * 1000}]}, "messages", "the prompt has 1,018 tokens"),
        ({"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages", "100,000 characters"),
        ({"messages": [{"role": "user"}]}, "messages", "needs a content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "messages.0.content: give a text, or a list of parts",
        ),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "cannot set self"),
        ({"chat_template_kwargs": {"x": NESTED}}, "chat_template_kwargs", "nested more than 100 deep"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": NESTED}}}, "response_format", "nested more than 100 deep"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"functions": [{"name": "f"}]}, "functions", "functions is not supported"),
        ({"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens", "more than the 3 tokens"),
        ({"max_completion_tokens": 700}, "max_completion_tokens", "max_completion_tokens 700 is more"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages",
            "must be a JSON object as text, got '[1]'",
        ),
    ],
)
def test_chats_that_are_refused(server, engine, change, param, words):
    found = error(server, "chat/completions", **{"messages": [{"role": "user", "content": "hi"}], **change})
    assert found["param"] == param and words in found["message"] and "Value error" not in found["message"]


WRONG = [1] * 1000


@pytest.mark.parametrize(
    "kind, body",
    [
        (CompletionBody, {"prompt": [*WRONG, "a"]}),
        (CompletionBody, {"prompt": [WRONG, ["a"] * 1000]}),
        (CompletionBody, {"prompt": "a", "guided_choice": WRONG}),
        (CompletionBody, {"prompt": "a", "stop": WRONG}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": ["a"] * 1000}),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(token): "a" for token in range(2000)}}),
        (ChatBody, {"messages": WRONG}),
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": WRONG}]}),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": WRONG}]}),
        (ChatBody, {"messages": [{"role": "user", "content": "a"}], "tools": WRONG}),
        (ResponsesBody, {"input": WRONG}),
        (ResponsesBody, {"input": [{"role": "user", "content": WRONG}]}),
        (TokenizeBody, {"messages": WRONG}),
        (DetokenizeBody, {"tokens": ["a"] * 1000}),
    ],
)
def test_of_many_wrong_items_the_first_is_told(kind, body):
    """An error for each of them would be minutes of work and gigabytes for a body of four mebibytes."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": "tiny", **body})
    assert refused.value.error_count() < 10


def test_a_message_that_no_encoding_can_carry(server):
    body = json.dumps({"model": "tiny", "prompt": "a", "bad \ud800 name": 1})
    answer = httpx.post(f"{server[1]}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "bad \\ud800 name"


def test_no_choice_is_left_when_the_queue_is_full(server, engine, complete):
    engine.asked = [None] * 95
    with pytest.raises(openai.InternalServerError) as refused:
        complete(n=8)
    assert refused.value.status_code == 503
    assert all(request.cancelled for request, *_ in engine.asked[95:]) and len(engine.asked) == 100
