"""Reading texts and packing them into blocks of tokens."""

import json
import lzma
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dsla_hf.training.text import PackedTokens, read_texts

WORDS = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7}
DOCUMENTS = ["first text\nwith two lines", "zweiter Text: äöü €", "third"]


def write(path, content):
    data = content.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def word_tokenizer(eos="<eos>"):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # As Llama's: adds a token at the start of every text unless told not to.
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token=eos)


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["texts.txt", "texts.txt.xz"])
def test_documents_of_a_text_file_are_separated_by_nul(name, as_text, tmp_path):
    path = write(tmp_path / name, "\0".join(DOCUMENTS))
    assert list(read_texts(str(path) if as_text else path)) == DOCUMENTS


def test_text_file_without_nul_is_one_document(tmp_path):
    assert list(read_texts(write(tmp_path / "book.txt", "one\n\ntwo\n"))) == ["one\n\ntwo\n"]


def test_empty_documents_are_left_out(tmp_path):
    assert list(read_texts(write(tmp_path / "texts.txt", "\0a\0\0 \n\0b\0"))) == ["a", "b"]
    assert list(read_texts(write(tmp_path / "empty.txt", ""))) == []


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.xz", "my.texts.v2.jsonl"])
def test_documents_of_a_jsonl_file_are_its_text_fields(name, tmp_path):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=bool(i)) for i, text in enumerate(DOCUMENTS)]
    assert list(read_texts(write(tmp_path / name, "\n".join(lines) + "\n"))) == DOCUMENTS


def test_empty_lines_of_a_jsonl_file_are_no_documents(tmp_path):
    path = write(tmp_path / "texts.jsonl", '{"text": "a"}\n\n{"text": "b"}\n\n')
    assert list(read_texts(path)) == ["a", "b"]


def test_jsonl_is_read_line_by_line(tmp_path):
    texts = read_texts(write(tmp_path / "texts.jsonl", '{"text": "a"}\n{"title": "b"}\n'))
    assert next(texts) == "a", "a fault further down must not hide what comes before it"
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 2.*'text'.*'title'"):
        next(texts)


@pytest.mark.parametrize("name", ["texts.csv", "texts.json", "texts.xz", "texts.csv.xz", "texts", "txt", "texts.txt.gz"])
def test_other_kinds_of_file_are_refused_by_name(name, tmp_path):
    path = write(tmp_path / name, "a")
    with pytest.raises(ValueError, match=r"expected \.txt or \.jsonl") as caught:
        list(read_texts(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl.xz"])
def test_missing_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        list(read_texts(tmp_path / name))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"abc\x80\xff")
    with pytest.raises(ValueError, match=r"binary\.txt is no UTF-8 text \(byte 3 of a part\): convert it"):
        list(read_texts(tmp_path / "binary.txt"))


# --- packing ----------------------------------------------------------------------------------------------------


def pack(texts, length, **options):
    return PackedTokens.from_texts(texts, options.pop("tokenizer", None) or word_tokenizer(), length, progress=False, **options)


def test_blocks_are_cut_from_documents_joined_by_the_end_token():
    blocks = pack(["a b c", "d", "e a nonsense b c"], 4).blocks
    # a b c <eos> | d <eos> e a | <unk> b c <eos>
    assert blocks.tolist() == [[3, 4, 5, 1], [6, 1, 7, 3], [0, 4, 5, 1]]


def test_last_shorter_block_is_dropped():
    assert pack(["a b c", "d", "e a"], 4).blocks.tolist() == [[3, 4, 5, 1], [6, 1, 7, 3]]
    assert pack(["a b c", "d"], 6).blocks.tolist() == [[3, 4, 5, 1, 6, 1]]


def test_tokenizer_without_end_token():
    assert pack(["a b", "c d"], 2, tokenizer=word_tokenizer(eos=None)).blocks.tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("max_tokens, expected", [(4, 2), (5, 2), (6, 3), (100, 4), (None, 4)])
def test_max_tokens(max_tokens, expected):
    blocks = pack(["a b c", "d e", "a"], 2, max_tokens=max_tokens).blocks
    assert blocks.tolist() == [[3, 4], [5, 1], [6, 7], [1, 3]][:expected]


def test_no_more_texts_are_read_than_max_tokens_needs():
    def texts():
        yield "a b c"
        yield "d e"
        raise AssertionError("read on")

    assert len(pack(texts(), 2, max_tokens=6)) == 3


@pytest.mark.parametrize("texts, options", [(["a b"], {}), ([], {}), (["a b c d e"], {"max_tokens": 3})])
def test_less_than_one_block_is_refused(texts, options):
    with pytest.raises(ValueError, match=r"give \d tokens, less than one block of 4"):
        pack(texts, 4, **options)


def test_items():
    data = pack(["a b c", "d", "e a"], 4)
    assert len(data) == 2
    assert [set(item) for item in data] == [{"input_ids"}] * 2
    assert data[1]["input_ids"].dtype == torch.long and data[1]["input_ids"].tolist() == [6, 1, 7, 3]
    small = PackedTokens(data.blocks.to(torch.int16))
    assert small[0]["input_ids"].dtype == torch.long, "blocks may be stored small"
    with pytest.raises(IndexError):
        data[2]


# --- without datasets -------------------------------------------------------------------------------------------


def test_text_files_are_packed_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    files = [write(tmp_path / "one.txt.xz", "a b c\0d"), write(tmp_path / "two.jsonl", '{"text": "e a"}\n{"text": "b c"}\n')]
    found = PackedTokens.from_sources(map(str, files), word_tokenizer(), 4).blocks
    assert found.tolist() == pack(["a b c", "d", "e a", "b c"], 4).blocks.tolist()
    assert PackedTokens.from_sources(map(str, files), word_tokenizer(), 4, max_tokens=7).blocks.tolist() == found[:1].tolist()
    write(tmp_path / "three.csv", "text\na b")
    for source in (str(tmp_path / "three.csv"), "wikitext"):
        with pytest.raises(ImportError, match=r"pip install 'dsla-hf\[train\]'"):
            PackedTokens.from_sources([source], word_tokenizer(), 4)


def test_sources_are_refused_by_name(tmp_path):
    write(tmp_path / "other.jsonl", '{"text": "a b c d"}\n{"body": "x"}\n')
    write(tmp_path / "list.jsonl", "[1]\n")
    write(tmp_path / "broken.jsonl", "{\n")
    for name, message in (
        ("other.jsonl", r"other\.jsonl, line 2: records have neither 'text' nor 'messages', only \['body'\]"),
        ("list.jsonl", r"list\.jsonl, line 1: expected an object .* got list"),
        ("broken.jsonl", r"broken\.jsonl, line 1: no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedTokens.from_sources([str(tmp_path / name)], word_tokenizer(), 100)
