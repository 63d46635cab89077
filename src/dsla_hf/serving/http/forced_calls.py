"""Grammars of answers that call tools, for requests that want a call (`tool_choice`), or an answer in a format beside tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .errors import Failed
from .grammar import Grammar, quoted
from .messages import NamedTool, Tool
from .schema import ChatBody
from .token_bytes import TokenBytes
from .tools import ToolFormat

ARGUMENTS = ('{"name": ', ', "arguments": ', "}")  # around the name and the arguments of a call


def grammar_beside_tools(body: ChatBody, form: ToolFormat, asked: Grammar | None, tokens: TokenBytes) -> Grammar | None:
    """What the answer of a chat with tools must follow; asked: what it would have to without them.

    Raises:
        Failed: if both cannot be had.
    """
    choice = body.tool_choice
    tools = body.tools or []
    if isinstance(choice, NamedTool):
        name = choice.function.name
        return _exclusive(asked, calls(form, [tool for tool in tools if tool.function.name == name], False, tokens))
    several = body.parallel_tool_calls is not False
    if choice == "required":
        return _exclusive(asked, calls(form, tools, several, tokens))
    if asked is None:
        if form.marked and any(tool.function.strict for tool in tools):
            return Grammar("lark", calls(form, tools, several, tokens, after_text=True), "tools")
        return None
    if asked.kind != "json":
        raise Failed(400, f'{asked.param} leaves no room for tools: leave one of them out, or send tool_choice "none"', param=asked.param)
    lark = calls(form, tools, several, tokens).replace("start:", "calls:", 1)
    return Grammar("lark", f"start: answer | calls\nanswer: %json {asked.text}\n{lark}", asked.param)


def calls(form: ToolFormat, tools: Sequence[Tool], several: bool, tokens: TokenBytes, after_text: bool = False) -> str:
    """A Lark grammar of one call of these tools, or more where `several`, in the format of a model.

    after_text: text is free until the mark with which calls begin, and there may be none; arguments of tools that are not `strict` are any
        object.
    """
    named = [tool.function for tool in tools]
    followed = [function.parameters if function.strict or not after_text else None for function in named]
    rules = [f"arguments_{number}: %json {_schema(parameters)}" for number, parameters in enumerate(followed)]
    opening = "opening" if after_text else _mark(form.shown[0], tokens)

    def objects(before: str, between: str, after: str) -> str:
        """Rules for each tool's call, made of pieces around its name and its arguments."""
        return " | ".join(
            f"{quoted(before + json.dumps(function.name) + between)} arguments_{number} {quoted(after)}"
            for number, function in enumerate(named)
        )

    if form.name == "hermes":
        closing = _mark("</tool_call>", tokens)
        start = 'call ("\\n" call)*' if several else "call"
        rules += [f'call: {opening} "\\n" object "\\n" {closing}', "object: " + objects(*ARGUMENTS)]
    elif form.name == "mistral" and form.lists:
        start = f"{opening} " + ('"[" call (", " call)* "]"' if several else '"[" call "]"')
        rules.append("call: " + objects(*ARGUMENTS))
    elif form.name == "mistral":
        start = "call+" if several else "call"
        rules.append(f"call: {opening} object")
        marks = _mark("[ARGS]", tokens)
        rules.append("object: " + " | ".join(f"{quoted(f.name)} {marks} arguments_{number}" for number, f in enumerate(named)))
    else:  # Llama 3 calls one tool at a time
        start = "call"
        rules.append("call: " + objects('{"name": ', ', "parameters": ', "}"))
    if after_text:
        mark = _mark(form.shown[0], tokens)
        start = f"({start})? TEXT" if form.lists or not several else "call* TEXT"
        # A mark that is text, and no token of its own, is a lazy lexeme: it ends where the mark first comes.
        rules += ["TEXT: /(.|\\n)*/", *([f"opening: TEXT {mark}"] if mark.startswith("<") else [f"opening[lazy]: TEXT {mark}"])]
    return "\n".join([f"start: {start}", *rules])


def _exclusive(asked: Grammar | None, lark: str) -> Grammar:
    if asked is not None:
        raise Failed(400, f"{asked.param} and a tool_choice that wants a call exclude each other: leave one of them out", param=asked.param)
    return Grammar("lark", lark, "tools")


def _schema(parameters: dict[str, Any] | None) -> str:
    return json.dumps({"type": "object", **(parameters or {})})


def _mark(mark: str, tokens: TokenBytes) -> str:
    """A mark of the format: a token of its own where the vocabulary has it as a special one."""
    special = next((token for token in tokens.special if str(tokens.added.get(token)) == mark), None)
    return quoted(mark) if special is None else f"<[{special}]>"
