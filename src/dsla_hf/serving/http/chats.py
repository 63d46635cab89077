"""Answers of /v1/chat/completions: messages, with the calls of tools that are in their texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .answers import Choice, Piece
from .formats import Format, Gathered
from .logprobs import Entry, chat_logprobs
from .schema import ChatBody
from .token_bytes import TokenBytes
from .tools import CallReader, Delta, ToolFormat


class Chats(Format):
    """See `Format`; tools: how the model writes calls, None where it may not call."""

    kind, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompt = "messages"
    body: ChatBody

    def __init__(self, model: str, body: ChatBody, tokens: TokenBytes, tools: ToolFormat | None = None):
        super().__init__(model, body, tokens)
        self.tools = tools
        self.limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        self._readers: dict[int, CallReader] = {}

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": gathered.text, "refusal": None}
        calls: list[dict[str, Any]] = []
        if reader := self._reader(gathered.choice):
            message["content"] = ""
            for delta in reader.add(gathered.text) + reader.end():
                message["content"] += delta.content
                if delta.name is not None:
                    calls.append(self._call(delta.name))
                if delta.arguments:
                    calls[-1]["function"]["arguments"] += delta.arguments
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = calls
        finish = "tool_calls" if calls and gathered.finish == "stop" else gathered.finish
        return {"message": message, "logprobs": self._logprobs(gathered.entries), "finish_reason": finish}

    def openings(self, choice: Choice) -> Iterator[dict[str, Any]]:
        yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.entries)
        reader = self._reader(piece.choice)
        if reader is None:
            yield {"delta": {"content": piece.text} if piece.text else {}, "logprobs": logprobs}
            return
        deltas = reader.add(piece.text) + (reader.end() if piece.finish is not None else [])
        for delta in deltas:
            yield {"delta": self._shown(delta), "logprobs": logprobs, "finish_reason": None}
            logprobs = None  # once
        if piece.finish is not None:
            yield {
                "delta": {},
                "logprobs": logprobs,
                "finish_reason": "tool_calls" if reader.calls and piece.finish == "stop" else piece.finish,
            }
        elif not deltas:
            yield {"delta": {}, "logprobs": logprobs}

    def _shown(self, delta: Delta) -> dict[str, Any]:
        if delta.call is None:
            return {"content": delta.content}
        call = {"function": {"arguments": delta.arguments}} if delta.name is None else self._call(delta.name)
        return {"tool_calls": [{"index": delta.call, **call}]}

    def _call(self, name: str) -> dict[str, Any]:
        assert self.tools is not None
        return {"id": self.tools.new_id(), "type": "function", "function": {"name": name, "arguments": ""}}

    def _reader(self, choice: Choice) -> CallReader | None:
        if self.tools is None:
            return None
        if choice.index not in self._readers:
            self._readers[choice.index] = self.tools.reader([tool.function.name for tool in self.body.tools or ()])
        return self._readers[choice.index]

    def _logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self.tokens) if self.body.logprobs else None
