"""Calls of tools in texts: each format, whole and cut at every place, and what only looks like a call."""

import json

import pytest
from scripted import CHAT, every_byte_tokenizer

from dsla_hf.serving.http.token_bytes import TokenBytes
from dsla_hf.serving.http.tools import FORMATS, format_of

F, G = '{"name": "f", "arguments": {"a": 1}}', '{"arguments": {}, "name": "g"}'
DEEP = '{"x": "}\\"{", "y": [1, {"z": "\\\\"}], "n": -1.5e+3}'
HERMES = [
    ("plain", "plain", []),
    (" \n", " \n", []),
    ("a < b <tool <tool_call", "a < b <tool <tool_call", []),
    ("a <tool_call>", "a <tool_call>", []),
    (f"<tool_call>\n{F}\n</tool_call>", "", [("f", '{"a": 1}')]),
    (f"So: \n<tool_call>\n{F}\n</tool_call>\n<tool_call>{G}</tool_call>\n", "So:", [("f", '{"a": 1}'), ("g", "{}")]),
    (f"<tool_call>{F}<tool_call>{G}", "", [("f", '{"a": 1}'), ("g", "{}")]),
    (f'<tool_call>{{"name": "f", "arguments": {DEEP}}}</tool_call>', "", [("f", DEEP)]),
    ('<tool_call>{"name": "f"}</tool_call> and  more ', "and  more", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> after', "after", [("f", '{"a": 1}')]),  # a brace short
    ('<tool_call>{"name": "f", "arguments": {"a": "cu', "", [("f", '{"a": "cu')]),
    ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
    ('<tool_call> {"name": "f", "arg', '<tool_call> {"name": "f", "arg', []),
    (f"<tool_call>{F}</tool_call>{{}}<tool_call>{{}}</tool_call>", "{}<tool_call>{}</tool_call>", [("f", '{"a": 1}')]),
]
MISTRAL = [
    ("plain [TOOL", "plain [TOOL", []),
    (f"[TOOL_CALLS] [{F}, {G}]", "", [("f", '{"a": 1}'), ("g", "{}")]),
    (f"Well [TOOL_CALLS][{F}]</s>", "Well</s>", [("f", '{"a": 1}')]),
    ('[TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]g{"b": 2}', "", [("f", '{"a": [1]}'), ("g", '{"b": 2}')]),
    (f"[TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{DEEP}", "", [("f", DEEP)]),
    ('[TOOL_CALLS]f[ARGS]{"a": ', "", [("f", '{"a": ')]),
    ("[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    ("[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ('[TOOL_CALLS][{"a": 1}] x', '[TOOL_CALLS][{"a": 1}] x', []),
    ("[TOOL_CALLS]f[ARGS]oops", "[TOOL_CALLS]f[ARGS]oops", []),
]
LLAMA = [
    ('plain {"name": "f"', 'plain {"name": "f"', []),
    (" \n", " \n", []),
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ('{"type": "function", "name": "g", "parameters": {}} thanks', "thanks", [("g", "{}")]),
    (' <|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": null}}', "", [("f", "{}"), ("g", '{"x": null}')]),
    ('{"name": "unknown", "parameters": {}} hm', '{"name": "unknown", "parameters": {}} hm', []),
    ('{"answer": 1}', '{"answer": 1}', []),
    ('{"name": "f", "parameters": {"a": "cu', "", [("f", '{"a": "cu')]),
    ('{"name": "f", "parameters": {}}; no', "; no", [("f", "{}")]),
    ("<|python_tag|>import x", "import x", []),
    ("\n Hello {}", "\n Hello {}", []),
]
CASES = [(name, *case) for name, cases in (("hermes", HERMES), ("mistral", MISTRAL), ("llama3", LLAMA)) for case in cases]


def read(name, pieces):
    reader = FORMATS[name].reader(["f", "g"])
    deltas = [delta for piece in pieces for delta in reader.add(piece)] + reader.end()
    content, calls = "", []
    for delta in deltas:
        content += delta.content
        if delta.name is not None:
            assert delta.call == len(calls)
            calls.append([delta.name, ""])
        if delta.arguments:
            calls[delta.call][1] += delta.arguments
    assert reader.calls == len(calls)
    return content, [tuple(call) for call in calls]


@pytest.mark.parametrize("name, text, content, calls", CASES)
def test_calls_are_read_wherever_the_text_is_cut(name, text, content, calls):
    assert read(name, [text]) == (content, calls)
    assert read(name, text) == (content, calls)
    for cut in range(len(text)):
        assert read(name, [text[:cut], text[cut:]]) == (content, calls), text[:cut]


def test_arguments_come_before_the_call_has_ended():
    reader = FORMATS["hermes"].reader(["f"])
    assert reader.add('Hm <tool_call>{"name": "f", "arg')[0].content == "Hm"
    name, begin = reader.add('uments": {"a"')
    assert (name.call, name.name, begin.call, begin.arguments) == (0, "f", 0, '{"a"')
    assert [delta.arguments for delta in reader.add(': "long')] == [': "long']
    assert [delta.arguments for delta in reader.add('"}}')] == ['"}'] and reader.end() == []


def test_a_long_call_takes_no_time():
    text = json.dumps({"name": "f", "arguments": {"a": "x" * 50_000}})
    assert read("hermes", f"<tool_call>{text}</tool_call>")[1][0][1] == json.dumps({"a": "x" * 50_000})


def test_the_template_says_which_format():
    assert format_of(CHAT).name == "hermes"
    assert format_of('{"name": function name, "parameters": dictionary of argument name and its value}').name == "llama3"
    old, new = format_of("[AVAILABLE_TOOLS] [TOOL_CALLS]"), format_of("[TOOL_CALLS] [ARGS]")
    assert (old.name, old.lists, new.name, new.lists) == ("mistral", True, "mistral", False)
    assert len(old.new_id()) == 9  # what its template takes
    assert format_of("{{ messages }}") is None and format_of("<tool_call><function=f>") is None


# --- tokens -------------------------------------------------------------------------------------------------------------


def test_bytes_and_places_of_tokens():
    tokenizer = every_byte_tokenizer(special=["<tool_call>"])
    tokens = TokenBytes(tokenizer)
    text = "a é\n😀!"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(tokens.of(token) for token in ids) == text.encode()
    assert tokens.text(ids[0]) == "a" and tokens.text(ids[2]) == "bytes:\\xc3" and tokens.text(ids[1]) == " "
    assert tokens.offsets(ids, text) == [0, 1, 2, 2, 3, 4, 4, 4, 4, 5]
    assert tokens.of(tokenizer.eos_token_id) == b"</s>" and tokens.offsets([1, *ids[:2]], "a ") == [0, 0, 1]
    assert tokens.of(100_000) == b""


def test_special_tokens_are_shown_where_they_are_part_of_a_call():
    tokenizer = every_byte_tokenizer(special=["<tool_call>", "<other>"])
    ids = tokenizer("a<tool_call>b<other></s>")["input_ids"]
    assert TokenBytes(tokenizer).decoder(["<tool_call>"])(ids) == "a<tool_call>b"
    assert TokenBytes(every_byte_tokenizer()).decoder(["<tool_call>"]) is None


def test_bytes_of_sentencepiece_tokens():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "\u2581Hello", "\u2581the", "re", "<0xC3>", "<0xA9>"]
    inner = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
    tokens, ids = TokenBytes(tokenizer), [1, 2, 3, 4, 5, 6]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "Hello thereé" and tokens.text(2) == " Hello" and tokens.text(5) == "bytes:\\xc3"
    assert tokens.offsets(ids, text) == [0, 0, 5, 9, 11, 11]
