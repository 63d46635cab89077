"""Texts that a checkpoint writes itself: of both kinds, the same after an interruption, and what is refused."""

import json

import pytest
import torch
from server import byte_tokenizer

from dsla_hf.training.own_texts import _begun, tokens_left, write_own_texts
from dsla_hf.training.text import token_blocks

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = {"length": 48, "batch": 4, "progress": False}


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def model(tiny_model, tokenizer):
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_have_as_many_tokens_as_asked_for(model, tokenizer, tmp_path):
    model.train()
    rows = rows_of(write_own_texts(model, tokenizer, tmp_path / "deep" / "own.jsonl", 300, **SMALL))
    assert all(row["text"].strip() for row in rows) and len({row["text"] for row in rows}) == len(rows)
    counted = [row["tokens_of_batch"] for row in rows if "tokens_of_batch" in row]
    assert sum(counted[:-1]) < 300 <= sum(counted) and model.training
    assert len(token_blocks([str(tmp_path / "deep" / "own.jsonl")], tokenizer, 32)) >= 4


def test_draws_are_the_models_own(model, tokenizer, tmp_path):
    """Options of its generation config do not narrow them, and its seed decides them."""
    model.generation_config.top_k = 1
    one, two, other = (
        write_own_texts(model, tokenizer, tmp_path / name, 300, seed=seed, **SMALL).read_text()
        for name, seed in (("one.jsonl", 0), ("two.jsonl", 0), ("other.jsonl", 1))
    )
    assert one == two != other
    begun_alike = [json.loads(line)["text"] for line in one.splitlines()][::2]
    assert len(set(begun_alike)) > 1


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.6, 0.9, 1.0])  # the first batch comes with the file, or not at all
def test_an_interrupted_file_becomes_what_it_would_have_been(kept, model, tokenizer, tmp_path):
    path = tmp_path / "own.jsonl"
    whole = write_own_texts(model, tokenizer, path, 500, **SMALL).read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    state = torch.get_rng_state()
    assert write_own_texts(model, tokenizer, path, 500, **SMALL).read_bytes() == whole
    assert torch.equal(state, torch.get_rng_state())


def test_a_finished_file_needs_no_model(model, tokenizer, tmp_path, monkeypatch):
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, **SMALL)
    monkeypatch.setattr(model, "generate", None)
    before = path.read_bytes()
    assert write_own_texts(model, tokenizer, path, 100, **SMALL).read_bytes() == before


def test_what_is_left_to_write_is_known_without_a_model(model, tokenizer, tmp_path):
    settings = {name: value for name, value in SMALL.items() if name != "progress"}
    path = tmp_path / "own.jsonl"
    assert tokens_left(path, 100, tokenizer, "cpu", **settings) == 100 and not path.exists()
    write_own_texts(model, tokenizer, path, 500, **SMALL)
    assert tokens_left(path, 500, tokenizer, "cpu", **settings) == 0
    with pytest.raises(ValueError, match="name another file"):
        tokens_left(path, 500, tokenizer, "cpu", **settings | {"seed": 5})
    assert 0 < tokens_left(path, 10_000, tokenizer, "cpu", **settings) <= 9_500
    cut = path.read_bytes()[:-9]
    path.write_bytes(cut)
    assert tokens_left(path, 500, tokenizer, "cpu", **settings) > 0 and path.read_bytes() == cut


def test_other_settings_are_refused_and_change_nothing(model, tokenizer, tmp_path):
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, **SMALL)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="name another file, or remove it"):
        write_own_texts(model, tokenizer, path, 100, seed=5, **SMALL)
    assert path.read_bytes() == before


def test_texts_of_another_model_are_refused(tiny_model, model, tokenizer, tmp_path):
    """By its name where no model is loaded, by its weights where one is: a folder may hold another version by now."""
    settings = {name: value for name, value in SMALL.items() if name != "progress"}
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, name="org/first", **SMALL)
    before = path.read_bytes()
    assert rows_of(path)[-1]["settings"]["model"] == "org/first"
    assert tokens_left(path, 100, tokenizer, "cpu", name="org/first", **settings) == 0
    with pytest.raises(ValueError, match="written with model 'org/first', not 'org/second': name another file, or remove it"):
        tokens_left(path, 100, tokenizer, "cpu", name="org/second", **settings)
    with pytest.raises(ValueError, match="written with model 'org/first', not 'org/second'"):
        write_own_texts(model, tokenizer, path, 300, name="org/second", **SMALL)
    other = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"written with weights '[0-9a-f]{16}', not '[0-9a-f]{16}': name another file"):
        write_own_texts(other, tokenizer, path, 300, name="org/first", **SMALL)
    assert path.read_bytes() == before


def test_a_folder_may_be_named_from_anywhere(model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "mine")
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, name=str(tmp_path / "mine"), **SMALL)
    monkeypatch.chdir(tmp_path / "mine")
    settings = {name: value for name, value in SMALL.items() if name != "progress"}
    assert tokens_left(path, 100, tokenizer, "cpu", name=".", **settings) == 0
    assert str(tmp_path) not in path.read_text()


def test_lines_that_do_not_name_their_model_are_refused(model, tokenizer, tmp_path):
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, name="org/first", **SMALL)
    path.write_text(path.read_text().replace('"model": "org/first", ', ""))
    with pytest.raises(ValueError, match="written with model None, not 'org/first'"):
        write_own_texts(model, tokenizer, path, 100, name="org/first", **SMALL)


@pytest.mark.parametrize("content", ['{"text": "mine"}\n', "5\n", '{"last_of_batch": 0}\n', "no JSON"])
def test_a_file_of_somebody_else_is_left_alone(content, model, tokenizer, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="something else than texts written here"):
        write_own_texts(model, tokenizer, path, 100, **SMALL)
    with pytest.raises(ValueError, match="something else than texts written here"):
        tokens_left(path, 100, tokenizer, "cpu", length=48, batch=4)
    assert path.read_text() == content


def test_a_tokenizer_may_have_more_words_than_the_model(tiny_model, tokenizer, tmp_path):
    model = tiny_model("llama", vocab_size=len(tokenizer) // 4)
    model.generation_config.eos_token_id = None
    assert rows_of(write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 1, length=8, batch=32, progress=False))


def test_a_chat_model_asks_and_answers(model, tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = TEMPLATE
    seen = []
    generate = model.generate

    def ending(**inputs):
        """A question that ends after five tokens, in three of four rows."""
        seen.append(inputs)
        out = generate(**inputs)
        if inputs["input_ids"].shape[1] == len(tokenizer("<user>")["input_ids"]):
            out[:3, inputs["input_ids"].shape[1] + 5] = tokenizer.eos_token_id
        return out

    model.generation_config.eos_token_id = None
    monkeypatch.setattr(model, "generate", ending)
    path = write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 1, **{**SMALL, "length": 64})
    rows = rows_of(path)
    assert 1 <= len(rows) <= 3
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] and all(x["content"] for x in row["messages"])
    asked = seen[1]["input_ids"][0][seen[1]["attention_mask"][0].bool()]
    text = tokenizer.decode(asked)
    assert text.startswith("<user>") and text.endswith("<assistant>")
    blocks = token_blocks([str(path)], tokenizer, 16)
    assert 0 < float(torch.stack([torch.as_tensor(row["loss_mask"]).float() for row in blocks]).mean()) < 1


def test_bad_settings_are_named(model, tokenizer, tmp_path):
    for words, settings in (
        ("tokens must be 1", {"tokens": 0}),
        ("length 8 or more", {"length": 4}),
        ("temperature", {"temperature": 0.0}),
        ("batch must be 1", {"batch": -1}),
    ):
        with pytest.raises(ValueError, match=words):
            write_own_texts(model, tokenizer, tmp_path / "own.jsonl", **{"tokens": 10, **settings})
    tokenizer.chat_template = "{{ bos_token }}always the same"
    with pytest.raises(ValueError, match="does not show what the user writes"):
        write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 10, **SMALL)
    assert not (tmp_path / "own.jsonl").exists()


def test_a_model_without_words_is_told(model, tokenizer, tmp_path, monkeypatch):
    end = tokenizer.eos_token_id
    monkeypatch.setattr(model, "generate", lambda input_ids, **options: torch.cat([input_ids, torch.full_like(input_ids, end)], 1))
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="three batches were empty"):
        write_own_texts(model, tokenizer, tmp_path / "own.jsonl", 100, **SMALL)


def test_nothing_is_there_before(tmp_path):
    assert _begun(tmp_path / "own.jsonl", {}) == (0, 0)
