"""Grammars as constraints of texts: which tokens may come, what ends them, what is kept."""

import asyncio
import json
import os

import pytest
import torch
from scripted import every_byte_tokenizer

from dsla_hf.serving.http import grammar as module
from dsla_hf.serving.http.errors import CannotFollow, Failed, as_failed
from dsla_hf.serving.http.grammar import Grammar, Grammars, asked_for, quoted
from dsla_hf.serving.http.schema import CompletionBody

VOCAB = 270  # more than the tokenizer has, as models have


@pytest.fixture
def made():
    tokenizer = every_byte_tokenizer()
    grammars = Grammars(tokenizer, VOCAB, {tokenizer.eos_token_id})
    yield tokenizer, grammars
    grammars.close()


def constraints(grammars, kind, text, count=1):
    return asyncio.run(grammars.constraints(Grammar(kind, text, "field"), count))


def allowed(constraint, tokenizer):
    """The text of the tokens that may come, the end as a dot."""
    mask = constraint.mask()
    assert mask.dtype == torch.int32 and mask.shape == (9,) and mask.device.type == "cpu"
    ids = [token for token in range(9 * 32) if int(mask[token // 32]) >> token % 32 & 1]
    assert all(token < len(tokenizer) for token in ids)
    return "".join("." if token == tokenizer.eos_token_id else tokenizer.decode([token]) for token in ids)


def test_masks_follow_the_text_to_its_end(made):
    tokenizer, grammars = made
    one, other = constraints(grammars, "regex", "a[bc]d?", 2)
    assert allowed(one, tokenizer) == "a"
    one.accept(*tokenizer("a")["input_ids"])
    assert (allowed(one, tokenizer), allowed(other, tokenizer)) == ("bc", "a")  # each for itself
    one.accept(*tokenizer("c")["input_ids"])
    assert allowed(one, tokenizer) == ".d"
    one.accept(*tokenizer("d")["input_ids"])
    assert allowed(one, tokenizer) == "."
    for _ in range(2):  # also where a text goes on to its length
        one.accept(tokenizer.eos_token_id)
        assert allowed(one, tokenizer) == "."
    with pytest.raises(CannotFollow, match="the grammar could not be followed"):
        other.accept(*tokenizer("x")["input_ids"])


def test_grammars_are_compiled_once_and_the_last_ones_kept(made, monkeypatch):
    tokenizer, grammars = made
    monkeypatch.setattr(module, "KEPT", 2)
    constraints(grammars, "regex", "a")
    first = grammars._compiled["regex", "a"]
    constraints(grammars, "regex", "b")
    constraints(grammars, "regex", "a")
    assert grammars._compiled["regex", "a"] is first
    constraints(grammars, "lark", 'start: "c"')
    assert list(grammars._compiled) == [("regex", "a"), ("lark", 'start: "c"')]
    with pytest.raises(Failed, match="field cannot be followed"):
        constraints(grammars, "regex", "(")
    assert len(grammars._compiled) == 2


def test_what_becomes_too_complex_is_an_error_of_the_request(made):
    tokenizer, grammars = made
    many = [f"{number:06d}" for number in range(9000)]
    texts = asked_for(CompletionBody(model="tiny", prompt="x", guided_choice=many))
    (choice,) = constraints(grammars, texts.kind, texts.text)
    choice.accept(*tokenizer("0")["input_ids"])
    assert allowed(choice, tokenizer) == "0"  # many choices are not too complex
    (deep,) = constraints(grammars, "lark", "start: " + " | ".join(map(quoted, many)))
    with pytest.raises(CannotFollow) as failed:
        deep.accept(*tokenizer("0")["input_ids"])
    assert as_failed(failed.value).status == 400


def chain(form, count, end):
    """Lines of which each names the next."""
    return [*(form.format(number, number + 1) for number in range(count)), end.format(count)]


CHAINS = {
    "rules": ("lark", "\n".join(["start: r0", *chain("r{}:r{}", 9000, 'r{}:"a"')])),
    "nested rules": ("lark", "\n".join(["start: r0", *chain("r{}:" + "(" * 25 + "r{}" + ")" * 25, 2000, 'r{}:"a"')])),
    "schemas": (
        "json",
        json.dumps({"$ref": "#/$defs/0", "$defs": {**{str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(3500)}, "3500": {}}}),
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("which", CHAINS)
def test_long_chains_do_not_end_the_process(which):
    """In a process of its own, which a stack that is too small would end."""
    kind, text = CHAINS[which]
    assert 2**16 < len(text) <= module.LONGEST
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tokenizer = every_byte_tokenizer()
            (one,) = constraints(Grammars(tokenizer, VOCAB, {tokenizer.eos_token_id}), kind, text)
            code = 0 if kind == "json" or allowed(one, tokenizer) == "a" else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_choices_may_have_any_characters(made):
    tokenizer, grammars = made
    text = "".join(map(chr, range(1, 0x180))) + "\u2028\uffff😀"
    grammar = asked_for(CompletionBody(model="tiny", prompt="x", guided_choice=[text]))
    (one,) = constraints(grammars, grammar.kind, grammar.text)
    for token in tokenizer(text)["input_ids"]:
        one.accept(token)
    assert allowed(one, tokenizer) == "."


def test_slow_tokenizers_are_refused():
    grammars = Grammars(object(), VOCAB, {2})
    with pytest.raises(Failed, match="grammars need a fast tokenizer, this model's is object"):
        constraints(grammars, "regex", "a")
    grammars.close()
