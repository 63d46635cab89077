"""Tools and answers in a format, by OpenAI's own client, of an engine whose texts are given and whose constraints are llguidance's."""

import builtins
import json

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel
from scripted import CHAT, Scripted, every_byte_tokenizer
from server import served

from dsla_hf.serving.http.api import ApiOptions, build_app

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
HI = [{"role": "user", "content": "hi"}]
SPECIAL = {"hermes": [], "llama3": ["<|python_tag|>"], "mistral": ["[TOOL_CALLS]"]}
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}; {"name": "now", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}, {"name": "now", "arguments": {}}]',
}


@pytest.fixture(scope="module", params=SPECIAL)
def each(request):
    """A server for each format."""
    with running(request.param) as (engine, client, _):
        yield request.param, engine, client


def running(form, template=CHAT):
    from contextlib import contextmanager

    @contextmanager
    def made():
        tokenizer = every_byte_tokenizer(SPECIAL.get(form, []), template)
        engine = Scripted(tokenizer, max_tokens=4000)
        app = build_app(engine, tokenizer, ApiOptions("tiny", tool_format=form, max_new_tokens=600))
        with served(app) as (_, address):
            yield engine, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address

    return made()


@pytest.fixture(scope="module")
def hermes():
    with running("auto") as found:
        yield found


def ask(client, messages=HI, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def joined(chunks):
    """The message that a stream gives, and why it ended."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.index == len(calls):
                assert call.id and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        finish = choice.finish_reason or finish
    return content, [(name, json.loads(arguments)) for name, arguments in calls], finish


def of(answer):
    (choice,) = answer.choices
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
    return choice.message.content or "", calls, choice.finish_reason


def test_parallel_calls_whole_and_streamed(each):
    form, engine, client = each
    engine.script = CALLS[form]
    expected = ("", [("weather", {"city": "Oslo", "days": 2}), ("now", {})], "tool_calls")
    whole = ask(client, tools=TOOLS)
    assert of(whole) == expected and whole.choices[0].message.content is None
    assert len({call.id for call in whole.choices[0].message.tool_calls}) == 2
    assert joined(ask(client, tools=TOOLS, stream=True)) == expected
    prompt = engine.tokenizer.decode(engine.asked[-1][0].prompt)  # the template was given them, with what they left out
    assert (
        '"name": "weather"' in prompt and '"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}' in prompt
    )
    # Without tools, and with "none", a text is a text.
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = ask(client, **options)
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.tool_calls is None
        assert "weather" in answer.choices[0].message.content
        assert '"name": "weather"' not in engine.tokenizer.decode(engine.asked[-1][0].prompt)
    engine.script = "just text"
    assert of(ask(client, tools=TOOLS)) == joined(ask(client, tools=TOOLS, stream=True)) == ("just text", [], "stop")


def test_calls_that_are_wanted_come_whatever_the_model_would_say(each):
    form, engine, client = each
    good = CALLS[form].removeprefix("<|python_tag|>")
    engine.script = good.replace('"Oslo"', '"Omsk"').replace("2}", "77}")
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for stream in (False, True):
            answer = ask(client, tools=TOOLS, tool_choice=choice, stream=stream, max_tokens=400, parallel_tool_calls=False)
            content, calls, finish = joined(answer) if stream else of(answer)
            assert (content, finish) == ("", "tool_calls") and len(calls) == 1
            assert calls[0][0] == "weather"
            jsonschema.validate(calls[0][1], WEATHER)
    engine.script = good
    calls = of(ask(client, tools=TOOLS, tool_choice="required"))[1]
    assert calls == [("weather", {"city": "Oslo", "days": 2}), ("now", {})][: 1 if form == "llama3" else 2]


def test_the_newer_format_of_mistral_can_be_wanted():
    with running("auto", CHAT + "{# [TOOL_CALLS] [ARGS] #}") as (engine, client, _):
        engine.script = '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 1}[TOOL_CALLS]now[ARGS]{}'
        expected = ("", [("weather", {"city": "Rome", "days": 1}), ("now", {})], "tool_calls")
        assert of(ask(client, tools=TOOLS, tool_choice="required")) == of(ask(client, tools=TOOLS)) == expected


def test_a_model_without_tools_says_so():
    with running("none") as (_, client, _):
        with pytest.raises(openai.BadRequestError, match="knows no tools") as refused:
            ask(client, tools=TOOLS)
        assert refused.value.param == "tools"
    with pytest.raises(ValueError, match="tool_format must be one of auto, none, hermes, llama3, mistral, got 'xml'"):
        ApiOptions("tiny", tool_format="xml")


# --- formats ----------------------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str
    people: int


def test_answers_in_a_format(hermes):
    engine, client, _ = hermes
    engine.script = '{"city": "Omsk", "days": 5}'
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    for options in (
        {"response_format": form},
        {"extra_body": {"guided_json": WEATHER}},
        {"extra_body": {"guided_json": json.dumps(WEATHER)}},
    ):
        jsonschema.validate(json.loads(ask(client, **options).choices[0].message.content), WEATHER)
    engine.script = '{"a": [1, 2]} and more'
    assert json.loads(ask(client, response_format={"type": "json_object"}).choices[0].message.content) == {"a": [1, 2]}
    assert ask(client, response_format={"type": "text"}).choices[0].message.content == engine.script
    engine.script = '{"name": "Rome", "people": 3000000}'
    parsed = client.chat.completions.parse(model="tiny", messages=HI, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Rome", people=3000000)
    engine.script = "no, yes"
    assert ask(client, extra_body={"guided_choice": ["yes", 'a "no"', "no"]}).choices[0].message.content == "no"
    assert ask(client, extra_body={"guided_regex": "n[a-z], [xy]"}).choices[0].message.content == "no, y"
    grammar = 'start: "so: " word\nword: /[a-z]{2}/'
    assert client.completions.create(model="tiny", prompt="x", extra_body={"guided_grammar": grammar}).choices[0].text[:4] == "so: "


def test_each_choice_follows_the_grammar_by_itself(hermes):
    engine, client, _ = hermes
    scripts = iter(["yes", "no", "maybe"])
    engine.script = lambda prompt: next(scripts)
    answer = ask(client, n=3, extra_body={"guided_choice": ["yes", "no", "maybe"]})
    assert [choice.message.content for choice in answer.choices] == ["yes", "no", "maybe"]


def test_a_format_beside_tools_is_an_answer_or_a_call(hermes):
    engine, client, _ = hermes
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    engine.script = CALLS["hermes"]
    assert of(ask(client, tools=TOOLS, response_format=form))[1] == [("weather", {"city": "Oslo", "days": 2}), ("now", {})]
    engine.script = '{"city": "Rome", "days": 3} '
    content, calls, _ = of(ask(client, tools=TOOLS, response_format=form))
    assert (json.loads(content), calls) == ({"city": "Rome", "days": 3}, [])


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"guided_regex": "(("}, "guided_regex", "unclosed group"),
        ({"guided_json": {"type": 5}}, "guided_json", "type must be"),
        ({"guided_json": "[1"}, "guided_json", "guided_json must be a JSON schema"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_choice exclude each other"),
        ({"guided_regex": "a" * 200_000}, "guided_regex", "200,000 characters, at most 131,072"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "cannot be kept beside guided_regex"),
        ({"guided_regex": "a", "tools": TOOLS}, "guided_regex", "leaves no room for tools"),
        ({"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"}, "guided_regex", "exclude each other"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "give json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://example.org/x"}}}},
            "response_format",
            "cannot be followed",
        ),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", 'give "none", "auto", "required"'),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "names the tool 'x'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": {"type": 5}}}}}],
                "tool_choice": "required",
            },
            "tools",
            "tools cannot be followed",
        ),
    ],
)
def test_formats_and_tools_that_are_refused(hermes, body, param, words):
    answer = httpx.post(f"{hermes[2]}/v1/chat/completions", json={"model": "tiny", "messages": HI, **body})
    found = answer.json()["error"]
    assert answer.status_code == 400 and found["param"] == param and words in found["message"]


def test_without_llguidance_the_answer_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **options)

    with running("auto") as (_, client, _):
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(openai.BadRequestError, match="pip install llguidance") as refused:
            ask(client, extra_body={"guided_regex": "a"})
        assert refused.value.param == "guided_regex"
        assert ask(client).choices


def test_calls_may_have_halves_of_surrogate_pairs(hermes):
    """JSON can escape them, and so a model may."""
    engine, client, _ = hermes
    engine.script = '<tool_call>{"name": "\\ud800", "arguments": {"a": "\\udc00"}}</tool_call>'
    for stream in (False, True):
        answer = ask(client, tools=TOOLS, stream=stream)
        found = joined(answer) if stream else of(answer)
        assert found == (found[0], [("\ud800", {"a": "\udc00"})], "tool_calls")


# --- /v1/responses ------------------------------------------------------------------------------------------------------


def test_responses_whole(hermes):
    engine, client, _ = hermes
    engine.script = "well"
    found = client.responses.create(model="tiny", input="hi", instructions="be brief", max_output_tokens=20, temperature=0.5)
    assert engine.tokenizer.decode(engine.asked[-1][0].prompt) == "system: be brief\nuser: hi\nassistant: "
    assert engine.asked[-1][0].sampling.temperature == 0.5
    assert (found.output_text, found.status, found.usage.input_tokens, found.usage.output_tokens) == ("well", "completed", 37, 4)
    messages = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "developer", "content": "three"},
    ]
    cut = client.responses.create(model="tiny", input=messages, max_output_tokens=2)
    assert engine.tokenizer.decode(engine.asked[-1][0].prompt) == "user: one\nassistant: two\nsystem: three\nassistant: "
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == ("we", "incomplete", "max_output_tokens")
    assert client.responses.create(model="tiny", input="hi", metadata={"of": "mine"}).metadata == {"of": "mine"}
    engine.script = '{"name": "Rome", "people": 3}'
    parsed = client.responses.parse(model="tiny", input="hi", text_format=City)
    assert (parsed.text.format.name, parsed.text.format.strict) == ("City", True)
    assert client.responses.parse(model="tiny", input="hi", text_format=City).output_parsed == City(name="Rome", people=3)


def test_responses_as_events(hermes):
    engine, client, _ = hermes
    engine.script = "well"
    events = list(client.responses.create(model="tiny", input="hi", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(12))
    assert "".join(event.delta for event in events[4:8]) == events[8].text == events[-1].response.output_text == "well"
    with client.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == "well"
    *_, last = client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
    assert (last.type, last.response.status, last.response.output_text) == ("response.incomplete", "incomplete", "wel")


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_id is not supported"),
        ({"background": True}, "background", "not supported"),
        ({"input": 5}, "input", "give a text, or a list of messages"),
        ({"input": "a" * 5000}, "input", "tokens"),
        ({"temperature": 7}, "temperature", "got 7"),
        ({"beams": 1}, "beams", "not known here"),
        ({"max_output_tokens": 0}, "max_output_tokens", "got 0"),
        ({"max_output_tokens": 700}, "max_output_tokens", "max_output_tokens 700"),
        ({"input": "a" * 3900, "max_output_tokens": 300}, "input", "prompt tokens and max_output_tokens 300 are more than"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", 'give schema with the type "json_schema"'),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}}, "text", "text cannot be followed"),
    ],
)
def test_responses_that_are_refused(hermes, body, param, words):
    answer = httpx.post(f"{hermes[2]}/v1/responses", json={"model": "tiny", "input": "hi", **body})
    found = answer.json()["error"]
    assert answer.status_code == 400 and found["param"] == param and words in found["message"]


# --- strict tools -------------------------------------------------------------------------------------------------

STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
WRONG = {  # as long as what is right: the script goes on in step
    form: script.replace('"Oslo"', '"Omsk"').replace('"days": 2', '"days": 0').replace('"arguments": {}', '"arguments": {"zone": "utc"}')
    for form, script in CALLS.items()
}


@pytest.mark.parametrize("special", [True, False], ids=["marks are tokens", "marks are text"])
@pytest.mark.parametrize("form", ["hermes", "mistral"])
def test_calls_of_strict_tools_follow_their_schemas(form, special, monkeypatch):
    """The model is free to call none and to write before a call; those of other tools have arguments as it likes."""
    monkeypatch.setitem(SPECIAL, form, {"hermes": ["<tool_call>", "</tool_call>"], "mistral": ["[TOOL_CALLS]"]}[form] if special else [])
    with running(form) as (engine, client, _):
        for text in ("Fine weather, < 3 days of it.", ""):
            engine.script = text + WRONG[form]
            answer = of(ask(client, tools=STRICT, max_tokens=400))
            assert answer[0] == text and answer[2] == "tool_calls"
            (name, weather), (other, zone) = answer[1]
            jsonschema.validate(weather, WEATHER)
            assert (name, weather["city"], other, zone) == ("weather", "Oslo", "now", {"zone": "utc"})
            (name, wrong), *_ = of(ask(client, tools=TOOLS, max_tokens=400))[1]
            assert wrong["days"] == 0, "tools that are not strict are not forced"
        engine.script = "Nothing to call."
        assert of(ask(client, tools=STRICT)) == ("Nothing to call.", [], "stop")
