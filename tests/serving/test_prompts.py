"""Texts of requests become tokens by work that is bounded: what cannot fit is not read, and nobody is held up."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from server import byte_tokenizer

from dsla_hf.serving.engine.scheduler import QueueFull
from dsla_hf.serving.http import prompts
from dsla_hf.serving.http.errors import Failed
from dsla_hf.serving.http.prompts import PromptReader


class Client:
    """Of a request, whether it is still there."""

    def __init__(self, leaves_after=10**9):
        self.asked, self.leaves_after = 0, leaves_after

    async def is_disconnected(self):
        self.asked += 1
        return self.asked > self.leaves_after


class Counting:
    """A tokenizer that knows how many characters it was given."""

    def __init__(self):
        self.inner, self.read, self.seconds = byte_tokenizer(), [], 0.0
        self.chat_template = self.inner.chat_template

    def get_vocab(self):
        return self.inner.get_vocab()

    def apply_chat_template(self, *args, **options):
        return self.inner.apply_chat_template(*args, **options)

    def __call__(self, text, **options):
        time.sleep(self.seconds)
        self.read.append(len(text))
        return self.inner(text, **options)


@pytest.fixture
def made(monkeypatch):
    """A reader for texts of 1,000 tokens, pieces of 100 characters."""
    monkeypatch.setattr(prompts, "PIECE", 100)
    tokenizer = Counting()
    engine = SimpleNamespace(max_tokens=1000, scheduler=SimpleNamespace(waiting=[], max_waiting=4))
    reader = PromptReader(engine, tokenizer)
    yield reader, tokenizer
    reader.close()


def test_ids_are_the_tokenizers_own(made):
    reader, tokenizer = made
    for text in ("hello there", "a sentence of some words. " * 30):
        assert asyncio.run(reader.completion(text, Client())) == tokenizer.inner(text)["input_ids"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes? " * 40}]
    expected = tokenizer.inner.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(reader.chat(messages, Client())) == expected


def test_what_cannot_fit_is_refused_unread(made):
    reader, tokenizer = made
    assert reader.most_characters == 1000 * len("<pad>")
    chat = reader.chat([{"role": "user", "content": "a" * 5001}], Client())
    for read, field in ((reader.completion("a" * 5001, Client()), "prompt"), (chat, "messages")):
        with pytest.raises(Failed, match=r"longest text is 1,000 tokens, .* has 5,001 characters: send less") as failed:
            asyncio.run(read)
        assert (failed.value.status, failed.value.body["error"]["code"]) == (400, "context_length_exceeded")
        assert failed.value.body["error"]["param"] == field
    assert tokenizer.read == []


def test_a_text_of_too_many_tokens_is_read_no_further(made):
    reader, tokenizer = made
    with pytest.raises(Failed, match="more than 1,000 tokens"):
        asyncio.run(reader.completion("a" * 5000, Client()))
    assert 1000 < sum(tokenizer.read) < 1500 and max(tokenizer.read) == 100


def test_nothing_is_read_for_a_client_that_has_left(made):
    reader, tokenizer = made
    with pytest.raises(Failed) as failed:
        asyncio.run(reader.completion("a" * 900, Client(leaves_after=2)))
    assert failed.value.status == 499 and tokenizer.read == [100, 100] and reader.waiting == 0


def test_a_short_text_passes_long_ones(made):
    reader, tokenizer = made
    tokenizer.seconds = 0.01

    async def run():
        long = [asyncio.create_task(reader.completion("a" * 950, Client())) for _ in range(3)]
        await asyncio.sleep(0.025)
        await reader.completion("hello", Client())
        assert not any(task.done() for task in long)
        await asyncio.gather(*long)

    asyncio.run(run())


def test_those_who_wait_here_wait_for_the_engine_too(made):
    reader, tokenizer = made
    tokenizer.seconds = 0.02

    async def run():
        reader.engine.scheduler.waiting = ["a request"]
        tasks = [asyncio.create_task(reader.completion("hello", Client())) for _ in range(5)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert [isinstance(answer, QueueFull) for answer in answers] == [False, False, False, True, True]
    assert "4 requests wait already" in str(answers[-1]) and reader.waiting == 0


def test_a_tokenizer_or_template_that_refuses_is_an_error_of_the_request(made, monkeypatch):
    reader, tokenizer = made
    with pytest.raises(Failed, match="no such role"):
        asyncio.run(reader.chat([{"role": "bad", "content": "x"}], Client()))
    monkeypatch.setattr(Counting, "__call__", lambda *args, **options: (_ for _ in ()).throw(ValueError("what is that?")))
    with pytest.raises(Failed, match=r"cannot be tokenized.*what is that"):
        asyncio.run(reader.completion("x", Client()))
    tokenizer.chat_template = None
    with pytest.raises(Failed, match="no chat template"):
        asyncio.run(reader.chat([{"role": "user", "content": "x"}], Client()))
