"""Calls of tools in the text of a model, as it comes: the formats of Hermes and Qwen, of Llama 3 (JSON), of Mistral."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, replace
from typing import Any

ARGUMENTS = ("arguments", "parameters")  # names that models have for them
OUTSIDE = frozenset(' \t\r\n{}[]:,"+-.') | frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")  # of JSON's strings

Steps = Generator[None, None, Any]


@dataclass(frozen=True)
class Delta:
    """A piece of what a text says: of its content, or of the call of that number, whose first piece alone has a name."""

    content: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class CallScan:
    """Reads `{"name": ..., "arguments": {...}}` a character at a time, so far as to tell where the arguments begin and where all ends.

    Attributes:
        name: once it is known. done: it has ended, or it is no JSON. closed: the arguments have ended.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.closed = self.broken = False
        self._text: list[str] = []
        self._depth, self._string, self._escaped = 0, -1, False  # where a string begins that has not ended
        self._key: str | None = None
        self._value = False  # at depth 1: behind a colon
        self._arguments: list[str] | None = None

    def add(self, char: str) -> bool:
        """Whether the character belongs to it."""
        if not self._takes(char):
            self.done = self.broken = True
            return False
        self._text.append(char)
        inside = self._depth > 1
        if self._string >= 0:
            self._in_string(char)
        elif char == '"':
            self._string = len(self._text) - 1
        elif char in "{[":
            if self._depth == 1 and self._value and char == "{" and self._key in ARGUMENTS and self._arguments is None:
                self._arguments = []
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        elif self._depth == 1 and char in ":,":
            self._value = char == ":"
        if self._arguments is not None and not self.closed and (inside or self._depth > 1):
            self._arguments.append(char)
            self.closed = self._depth == 1
        return True

    def _takes(self, char: str) -> bool:
        if not self._text:
            return char == "{"
        return self._string >= 0 or char in OUTSIDE

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            begin, self._string = self._string, -1
            if self._depth == 1:
                word = _loaded("".join(self._text[begin:]))
                if not self._value:
                    self._key = word
                elif self._key == "name" and self.name is None:
                    self.name = word

    @property
    def has_begun(self) -> bool:
        """Whether it is a call for certain, whose arguments can be told as they come."""
        return self.name is not None and self._arguments is not None

    def take_arguments(self) -> str:
        """What has come of them since the last time."""
        found = "".join(self._arguments or ())
        if self._arguments is not None:
            self._arguments = []
        return found

    @property
    def text(self) -> str:
        return "".join(self._text)

    def whole(self) -> tuple[str, str] | None:
        """Name and arguments of a call that has ended without any, or with arguments as text; None if it is no call."""
        call = _loaded(self.text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = next((call[name] for name in ARGUMENTS if call.get(name) is not None), "{}")
        return (call["name"], arguments) if isinstance(arguments, str) and isinstance(_loaded(arguments), dict) else None


class CallReader:
    """Turns the text of a model into `Delta`s, a piece at a time; where pieces are cut changes nothing of what they say together.

    Text that only looks like a call stays content. Space around calls is dropped. A call counts from its name and the beginning of its
    arguments on; what is missing then was cut off by the end of the text.

    Args:
        names: of the tools there are, for a format whose calls have no mark.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]):
        self.calls, self.names = 0, names
        self._text, self._at, self._ended = "", 0, False
        self._space, self._behind_call = "", False  # space is content only if more follows
        self._out: list[Delta] = []
        self._steps = form.read(self)

    def add(self, text: str) -> list[Delta]:
        """What is certain now."""
        self._text = self._text[self._at :] + text
        self._at = 0
        next(self._steps, None)
        out, self._out = self._out, []
        return out

    def end(self) -> list[Delta]:
        """What is left when no more comes."""
        self._ended = True
        out = self.add("")
        if self._space and not self.calls:
            out.append(Delta(self._space))
        return out

    # --- what formats are read with -----------------------------------------------------------------------------------

    def content(self, mark: str | None = None) -> Steps:
        """Pass on what comes before `mark`, and whether it came."""
        while True:
            found = -1 if mark is None else self._text.find(mark, self._at)
            if found >= 0:
                assert mark is not None
                self.say(self._text[self._at : found])
                self._at = found + len(mark)
                return True
            rest = self._text[self._at :]
            keep = 0 if mark is None or self._ended else next((n for n in range(len(mark) - 1, 0, -1) if rest.endswith(mark[:n])), 0)
            self.say(rest[: len(rest) - keep])
            self._at = len(self._text) - keep
            if self._ended:
                return False
            yield

    def say(self, text: str) -> None:
        text = self._space + text
        if self._behind_call:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._behind_call = False
            self._out.append(Delta(said))

    def peek(self, count: int = 1) -> Steps:
        """The next characters, fewer at the end."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at : self._at + count]

    def take(self, mark: str) -> Steps:
        """Step over `mark`, and whether it was there."""
        there = (yield from self.peek(len(mark))) == mark
        self._at += len(mark) if there else 0
        return there

    def run(self, of: Callable[[str], bool]) -> Steps:
        """The next characters, as long as they are such ones."""
        found = ""
        while (char := (yield from self.peek())) and of(char):
            found += char
            self._at += 1
        return found

    def call(self, before: str = "", name: str | None = None) -> Steps:
        """Read a call, or its arguments alone where its name has been read; whether it was one. `before`: what was stepped over, content
        if it was none."""
        scan, begun = CallScan(), False
        head = "" if name is None else '{"name": ' + json.dumps(name) + ', "arguments": '
        for char in head:
            scan.add(char)
        while True:
            while self._at < len(self._text) and not scan.done and not (name is not None and scan.closed):
                self._at += scan.add(self._text[self._at])
            if not begun and scan.has_begun and self._knows(scan.name):
                begun = True
                self._begin(scan.name or "")
            if begun and (arguments := scan.take_arguments()):
                self._out.append(Delta(call=self.calls - 1, arguments=arguments))
            if scan.done or self._ended or (name is not None and scan.closed):
                break
            yield
        if not begun and not scan.broken and name is None and (whole := scan.whole()) is not None and self._knows(whole[0]):
            begun = True
            self._begin(whole[0])
            self._out.append(Delta(call=self.calls - 1, arguments=whole[1]))
        if not begun:
            self.say(before + scan.text[len(head) :])
        return begun

    def _knows(self, name: str | None) -> bool:
        return isinstance(name, str) and (not self.names or name in self.names)

    def _begin(self, name: str) -> None:
        self._space, self._behind_call = "", True
        self._out.append(Delta(call=self.calls, name=name))
        self.calls += 1


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _hermes(reader: CallReader) -> Steps:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times."""
    while (yield from reader.content("<tool_call>")):
        space = yield from reader.run(str.isspace)
        if (yield from reader.call("<tool_call>" + space)):
            yield from reader.run(str.isspace)
            yield from reader.take("</tool_call>")


def _mistral(reader: CallReader) -> Steps:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}` any number of times."""
    mark = "[TOOL_CALLS]"
    while (yield from reader.content(mark)):
        before = mark + (yield from reader.run(str.isspace))
        if (yield from reader.take("[")):
            before += "[" + (yield from reader.run(str.isspace))
            if (yield from reader.peek()) != "{":
                reader.say(before)
                continue
            while (yield from reader.peek()) == "{" and (yield from reader.call(before)):
                before = yield from reader.run(lambda char: char.isspace() or char == ",")
            if reader.calls:
                yield from reader.take("]")
            continue
        name = yield from reader.run(lambda char: char.isalnum() or char in "_.-")
        middle = ""
        if (yield from reader.take("[CALL_ID]")):
            middle = "[CALL_ID]" + (yield from reader.run(str.isalnum))
        if (yield from reader.take("[ARGS]")):
            middle += "[ARGS]"
        middle += yield from reader.run(str.isspace)
        if name and (yield from reader.peek()) == "{":
            yield from reader.call(before + name + middle, name)
        else:
            reader.say(before + name + middle)


def _llama(reader: CallReader) -> Steps:
    """A text that begins with `{"name": ..., "parameters": {...}}`, of a tool that there is; more behind semicolons."""
    before = yield from reader.run(str.isspace)
    yield from reader.take("<|python_tag|>")
    before += yield from reader.run(str.isspace)
    if (yield from reader.peek()) == "{":
        while (yield from reader.call(before)):
            before = yield from reader.run(lambda char: char.isspace() or char in ";,")
            if (yield from reader.take("<|python_tag|>")):
                before = ""
            if (yield from reader.peek()) != "{":
                reader.say(before)
                break
    else:
        reader.say(before)
    yield from reader.content()


def _short_id() -> str:
    return uuid.uuid4().hex[:9]


def _long_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls. shown: special tokens that are part of it. marked: a call begins with one of them. new_id: of a call, as
    the model's template takes it. lists: Mistral's calls are one list."""

    name: str
    read: Callable[[CallReader], Steps]
    shown: tuple[str, ...]
    marked: bool = True
    new_id: Callable[[], str] = _long_id
    lists: bool = False

    def reader(self, names: Collection[str]) -> CallReader:
        """For one text; names: of the tools there are."""
        return CallReader(self, () if self.marked else names)


FORMATS = {
    "hermes": ToolFormat("hermes", _hermes, ("<tool_call>", "</tool_call>")),
    "llama3": ToolFormat("llama3", _llama, ("<|python_tag|>",), marked=False),
    "mistral": ToolFormat("mistral", _mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), new_id=_short_id, lists=True),
}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template speaks of, None if it is none of those that are known."""
    if "[TOOL_CALLS]" in template:
        return replace(FORMATS["mistral"], lists="[ARGS]" not in template)
    if "<tool_call>" in template and not any(other in template for other in ("<function=", "<arg_key>")):
        return FORMATS["hermes"]
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return FORMATS["llama3"]
    return None
