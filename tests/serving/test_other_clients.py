"""litellm and langchain against the server, where they are installed; the engine's texts are given."""

import json

import pytest
from pydantic import BaseModel
from scripted import Scripted, every_byte_tokenizer
from server import served

from dsla_hf.serving.http.api import ApiOptions, build_app

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
HI = [{"role": "user", "content": "hi"}]


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(scope="module")
def server():
    tokenizer = every_byte_tokenizer()
    engine = Scripted(tokenizer, max_tokens=4000)
    with served(build_app(engine, tokenizer, ApiOptions("tiny", max_new_tokens=600))) as (_, address):
        yield engine, address


@pytest.mark.filterwarnings("ignore")  # theirs
def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = pytest.importorskip("litellm", reason="needs litellm (pip install litellm)")
    engine, address = server
    known = {"api_base": f"{address}/v1", "api_key": "none", "max_retries": 0}

    def ask(**options):
        return litellm.completion(model="openai/tiny", messages=HI, **known, **options)

    engine.script = "well"
    answer = ask(temperature=0.5, top_p=0.9, n=2, seed=3, stop=["x"], user="ada", logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == ["well", "well"] and answer.usage.completion_tokens == 8
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "well"
    engine.script = CALL
    (call,) = ask(tools=[TOOL], tool_choice="auto").choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    engine.script = '{"name": "Rome", "people": 3}'
    form = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema()}}
    assert City.model_validate_json(ask(response_format=form).choices[0].message.content).people == 3
    engine.script = "text"
    answer = litellm.text_completion(model="text-completion-openai/tiny", prompt=["a", "b"], max_tokens=8, **known)
    assert [choice.text for choice in answer.choices] == ["text", "text"]


@pytest.mark.filterwarnings("ignore")
def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai (pip install langchain-openai)")
    engine, address = server
    known = {"model": "tiny", "base_url": f"{address}/v1", "api_key": "none", "max_retries": 0}
    chat = langchain.ChatOpenAI(**known, temperature=0, seed=5)
    engine.script = "well"
    assert chat.invoke("hi").content == "well"
    assert "".join(chunk.content for chunk in chat.stream("hi")) == "well"
    assert [answer.content for answer in chat.batch(["a", "b", "c"])] == ["well"] * 3
    assert chat.bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"][0]["token"] == "w"
    engine.script = CALL
    (call,) = chat.bind_tools([TOOL]).invoke("hi").tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    engine.script = '{"name": "Rome", "people": 3}'
    for method in ("json_schema", "json_mode"):
        assert chat.with_structured_output(City, method=method).invoke("which?") == City(name="Rome", people=3)
    engine.script = '<tool_call>\n{"name": "City", "arguments": {"name":"Oslo","people":7}}\n</tool_call>'
    assert chat.with_structured_output(City, method="function_calling").invoke("which?") == City(name="Oslo", people=7)
    engine.script = "text"
    complete = langchain.OpenAI(**known, max_tokens=8, n=2)
    assert [[one.text for one in several] for several in complete.generate(["a", "b"]).generations] == [["text"] * 2] * 2
    assert "".join(langchain.OpenAI(**known).stream("a")) == "text"
