"""Training text through `datasets`: the same blocks from every kind of source, kept on disk, and marked where chats are answered."""

import json
import lzma
import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

datasets = pytest.importorskip("datasets", reason="needs the datasets library (extra 'train')")

from dsla_hf.training.text import token_blocks  # noqa: E402

WORDS = [f"w{i}" for i in range(50)]
TEXTS = [" ".join(WORDS[i : i + 7]) for i in range(0, 42, 3)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def by_hand(tokenizer, texts, length):
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def blocks_of(dataset):
    return [row["input_ids"].tolist() for row in dataset]


def write(path, texts=TEXTS):
    if ".txt" in path.suffixes:
        data = "\0".join(texts).encode()
        path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        frame = datasets.Dataset.from_dict({"text": texts})
        frame.to_parquet(str(path)) if path.suffix == ".parquet" else frame.to_csv(str(path), index=False)
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.json", "a.parquet", "a.csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_blocks(name, streaming, tokenizer, tmp_path):
    made = token_blocks([write(tmp_path / name)], tokenizer, 10, streaming=streaming)
    assert blocks_of(made) == by_hand(tokenizer, TEXTS, 10)
    row = next(iter(made))
    assert row["input_ids"].dtype == torch.int64 and set(row) == {"input_ids"}


def test_sources_are_read_in_their_order_and_packed_across_files(tokenizer, tmp_path):
    files = [write(tmp_path / "b.txt", TEXTS[:3]), write(tmp_path / "a.jsonl", TEXTS[3:])]
    assert blocks_of(token_blocks(files, tokenizer, 9)) == by_hand(tokenizer, TEXTS, 9)


@pytest.mark.parametrize("max_tokens, expected", [(10, 1), (19, 1), (20, 2), (10**6, 11)])
def test_max_tokens(max_tokens, expected, tokenizer, tmp_path):
    made = token_blocks([write(tmp_path / "a.txt")], tokenizer, 10, max_tokens=max_tokens)
    assert blocks_of(made) == by_hand(tokenizer, TEXTS, 10)[:expected]


def test_text_is_tokenised_once_and_again_when_anything_changes(tokenizer, tmp_path, monkeypatch):
    calls = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *a, **k: calls.append(1) or call(self, *a, **k))
    file = tmp_path / "a.txt"
    write(file)

    def read(**options):
        calls.clear()
        made = token_blocks([str(file)], tokenizer, options.pop("length", 10), **options)
        return blocks_of(made), len(calls)

    first, times = read()
    assert times > 0
    assert read() == (first, 0)
    assert read(length=5)[1] > 0 and read(max_tokens=20)[1] > 0 and read() == (first, 0)
    write(file, TEXTS[::-1])
    os.utime(file, ns=(1, 1))
    second, times = read()
    assert times > 0 and second == by_hand(tokenizer, TEXTS[::-1], 10) != first


def test_another_tokenizer_does_not_get_the_blocks_of_the_first(tokenizer, tmp_path):
    file = write(tmp_path / "a.txt")
    first = blocks_of(token_blocks([file], tokenizer, 10))
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, **{w: 80 - i for i, w in enumerate(WORDS)}}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    assert blocks_of(token_blocks([file], other, 10)) == by_hand(other, TEXTS, 10) != first


def test_hub_datasets_by_name_configuration_and_split(tokenizer, tmp_path, monkeypatch):
    asked = []

    def load(name, config=None, split=None, streaming=None, **options):
        asked.append((name, config, split, streaming))
        return iter([{"content": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = token_blocks(["org/corpus:small"], tokenizer, 10, split="validation", column="content", streaming=True)
    assert blocks_of(made) == by_hand(tokenizer, TEXTS, 10)
    assert set(asked) == {("org/corpus", "small", "validation", True)}


# --- chats --------------------------------------------------------------------------------------------------------


def chats(path, rows=6):
    records = [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1} w{i + 2}"}, {"role": "assistant", "content": f"w{i + 20} w{i + 21}"}]}
        for i in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_of_chats_the_assistants_tokens_are_marked(tokenizer, tmp_path):
    made = token_blocks([chats(tmp_path / "c.jsonl")], tokenizer, 12)
    ids = torch.cat([row["input_ids"] for row in made])
    marks = torch.cat([row["loss_mask"] for row in made])
    assert ids.tolist() == [token for i in range(6) for token in [i + 2, i + 3, i + 4, i + 22, i + 23, 0]]
    assert marks.tolist() == [0, 0, 0, 1, 1, 0] * 6


def test_all_tokens_of_chats_on_request(tokenizer, tmp_path):
    made = token_blocks([chats(tmp_path / "c.jsonl")], tokenizer, 12, completion_only=False)
    assert "loss_mask" not in made.features and len(made) == 3


def test_texts_beside_chats_are_learnt_in_full(tokenizer, tmp_path):
    made = token_blocks([chats(tmp_path / "c.jsonl", 2), write(tmp_path / "a.txt", TEXTS[:2])], tokenizer, 4)
    assert torch.cat([row["loss_mask"] for row in made]).tolist() == [0, 0, 0, 1, 1, 0] * 2 + [1] * 16


PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def test_without_marks_the_assistants_turns_are_found_by_rendering(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    tokenizer.add_tokens(["[user]", "[assistant]", "<end>"])
    messages = [("user", "w0 w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    messages = [{"role": role, "content": content} for role, content in messages]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    (row,) = token_blocks([str(tmp_path / "c.jsonl")], tokenizer, 15)
    assert tokenizer.decode(row["input_ids"]).split() == tokenizer.apply_chat_template(messages, tokenize=False).split() + ["<eos>"]
    learnt = tokenizer.decode(row["input_ids"][row["loss_mask"] != 0]).split()
    assert learnt == ["w2", "w3", "<end>", "w5", "<end>"], "what the assistant must write, the end of its turn among it"


def test_marks_and_renderings_find_the_same(tokenizer, tmp_path):
    def marks():
        return torch.cat([row["loss_mask"] for row in token_blocks([chats(tmp_path / "c.jsonl")], tokenizer, 12)])

    marked = marks()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    assert marks().tolist() == marked.tolist() and 0 < marked.sum() < len(marked)


@pytest.mark.parametrize("streaming", [False, True])
def test_template_that_writes_answers_anew_is_refused_with_the_way_out(streaming, tokenizer, tmp_path):
    # As those that leave thoughts out of answers that are not the last.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else m.content[:2] }} {% endfor %}"
    messages = [{"role": role, "content": "w10 w11"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match=r"message 2 of a chat is written in another way when the chat goes on.*--completion_only false"):
        list(token_blocks([str(tmp_path / "c.jsonl")], tokenizer, 4, streaming=streaming))
    assert len(token_blocks([str(tmp_path / "c.jsonl")], tokenizer, 4, completion_only=False)) == 1


def test_template_whose_marks_are_elsewhere_is_refused(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"none around what the assistant of this chat writes.*--completion_only false"):
        token_blocks([chats(tmp_path / "c.jsonl")], tokenizer, 12)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text(streaming, tokenizer, tmp_path):
    file = write(tmp_path / "a.txt", TEXTS[:2])
    with pytest.raises(ValueError, match="give 16 tokens, less than one block of 99"):
        list(token_blocks([file], tokenizer, 99, streaming=streaming))


def test_files_without_documents_text_or_a_known_kind(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "x", "id": 3}))
    (tmp_path / "notes.md").write_text("x")
    for name, error, message in (
        ("empty.txt", ValueError, "holds no documents"),
        ("other.jsonl", ValueError, r"neither 'text' nor 'messages', only \['body', 'id'\]"),
        ("notes.md", ValueError, r"expected .json, .jsonl, .parquet"),
        ("none.jsonl", FileNotFoundError, "no such file"),
    ):
        with pytest.raises(error, match=message):
            token_blocks([str(tmp_path / name)], tokenizer, 10)
