"""Answers that must follow a grammar: JSON schemas, regular expressions, choices and Lark grammars, by llguidance."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...inference.sampling import Constraint
from .errors import CannotFollow, Failed
from .schema import Options

KEPT = 64  # compiled grammars
LONGEST = 2**17  # characters of one
# llguidance compiles a chain of rules, or of references between schemas, by calls within calls: the longest that fits into LONGEST
# characters needs a stack of more than 64 MiB, and where it ends the process does, too. Memory is taken as far as it is used.
STACK_BYTES = 2**28
MAKERS = {"json": "grammar_from_json_schema", "regex": "grammar_from_regex", "lark": "grammar_from_lark"}  # of llguidance
MISSING = "this server cannot hold answers to a grammar: pip install llguidance (it comes with dsla-hf[serve]), and start it again"


@dataclass(frozen=True)
class Grammar:
    """kind: "json" (a schema, as text), "regex" or "lark". param: the field of the request that asks for it."""

    kind: str
    text: str
    param: str


def asked_for(body: Options, schema: str = "response_format") -> Grammar | None:
    """The grammar of a request, None for none; schema: the field that has its format.

    Raises:
        Failed: if it names several, or a schema that is none.
    """
    found: list[Grammar] = []
    form = body.response_format
    if form is not None and form.type != "text":
        wanted = {"type": "object"} if form.json_schema is None else form.json_schema.json_schema
        found.append(Grammar("json", json.dumps(wanted), schema))
    if body.guided_json is not None:
        found.append(Grammar("json", _schema(body.guided_json), "guided_json"))
    if body.guided_regex is not None:
        found.append(Grammar("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice is not None:
        choices = " | ".join(map(quoted, body.guided_choice))
        found.append(Grammar("lark", f"start: CHOICE\nCHOICE: {choices}", "guided_choice"))
    if body.guided_grammar is not None:
        found.append(Grammar("lark", body.guided_grammar, "guided_grammar"))
    if len(found) > 1:
        names = " and ".join(grammar.param for grammar in found)
        raise Failed(400, f"{names} exclude each other: leave one of them", param=found[1].param)
    return found[0] if found else None


def quoted(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one that JSON leaves as it is and Lark does not take


def _schema(given: dict[str, Any] | str) -> str:
    if isinstance(given, dict):
        return json.dumps(given)
    try:
        if not isinstance(json.loads(given), dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise Failed(400, f"guided_json must be a JSON schema: {error}", param="guided_json") from None
    return given


class Grammars:
    """Compiles grammars for the tokens of a model, in a thread of its own, and keeps those that were asked for last.

    Args:
        vocab_size: columns of the model's logits. eos_tokens: ids that may come where a text is complete.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_tokens: set[int]):
        self.tokenizer, self.vocab_size, self.eos_tokens = tokenizer, vocab_size, eos_tokens
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._thread = _deep_thread("grammar")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def constraints(self, grammar: Grammar, count: int) -> Sequence[Constraint]:
        """One for each of `count` texts.

        Raises:
            Failed: if the grammar is none, or too large, and where llguidance is missing.
        """
        if len(grammar.text) > LONGEST:
            raise Failed(400, f"{grammar.param} has {len(grammar.text):,} characters, at most {LONGEST:,} are taken", param=grammar.param)
        matcher = await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, grammar)
        return [GrammarConstraint(matcher.deep_copy(), self.vocab_size) for _ in range(count)]

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary, as llguidance has it; it takes a second for a large one."""
        import llguidance.hf

        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"grammars need a fast tokenizer, this model's is {type(self.tokenizer).__name__}")
        eos = sorted(self.eos_tokens) or [self.tokenizer.eos_token_id]
        return llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=eos)

    def _compile(self, grammar: Grammar) -> Any:
        key = grammar.kind, grammar.text
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        try:
            from llguidance import LLMatcher

            tokens = self._tokens
        except ImportError:
            raise Failed(400, MISSING, param=grammar.param) from None
        except ValueError as error:
            raise Failed(400, str(error), param=grammar.param) from None
        make = getattr(LLMatcher, MAKERS[grammar.kind])
        try:
            matcher = LLMatcher(tokens, make(grammar.text), log_level=0)
            wrong = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise Failed(400, f"{grammar.param} cannot be followed: {wrong.strip()[:500]}", param=grammar.param)
        self._compiled[key] = matcher
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return matcher


def _deep_thread(name: str) -> ThreadPoolExecutor:
    """One thread, with `STACK_BYTES` of stack."""
    before = threading.stack_size(STACK_BYTES)
    try:
        thread = ThreadPoolExecutor(1, name)
        thread.submit(int).result()  # it begins with the first work
    finally:
        threading.stack_size(before)
    return thread


class GrammarConstraint(Constraint):
    """What may come next in one text; `Constraint` says how it is asked.

    Raises (in its methods):
        CannotFollow: if the grammar becomes too complex, or a token comes that may not.
    """

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def mask(self) -> Tensor:
        bits = self.matcher.compute_bitmask()
        self._check()
        return torch.frombuffer(bytearray(bits), dtype=torch.int32)[: -(-self.vocab_size // 32)]

    def accept(self, token: int) -> None:
        if not self.matcher.is_stopped():  # else the text is complete, and only its end can come
            self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise CannotFollow(f"the grammar could not be followed: {self.matcher.get_error().strip()[:500]}")
