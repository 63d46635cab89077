"""Every code block of the README and of docs/ runs, page by page, in a folder with a small checkpoint, adapter and text."""

import re
from pathlib import Path

import pytest
import torch
from multimodal_models import save_llava
from peft import get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")), REPOSITORY / "eval" / "results" / "recipe.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Shells are tried elsewhere: make in CI, accelerate launch in test_distributed.py, eval/scale.py in test_scale.py, dsla in
# test_cli_commands.py, lm_eval in test_lm_eval.py, torchrun in test_tensor_parallel.py.
COMMANDS = ("make", "pip install", "dsla ", "accelerate launch examples/distill.py", "python eval/", "git clone")
COMMANDS += ("accelerate launch --config_file examples/configs/",)
COMMANDS += ("python -m dsla_hf.evaluation.lm_eval ", "lm_eval ", "torchrun --nproc-per-node 2 ")


def blocks(page, language):
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def name_of(page):
    return page.relative_to(REPOSITORY).as_posix()


def python_pages():
    return [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    words = [
        "the",
        "answer",
        "is",
        "that",
        "a",
        "layer",
        "of",
        "the",
        "model",
        "reads",
        "its",
        "state",
        "and",
        "the",
        "window",
        "of",
        "the",
        "text",
    ]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(400)) for i in range(1, 60)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-checkpoint")
    tokenizer.save_pretrained(folder / "my-checkpoint")
    save_llava(folder / "my-multimodal-checkpoint", config, tokenizer)
    Image.new("RGB", (12, 10), (200, 30, 30)).save(folder / "my_image.png")
    (folder / "my_text.txt").write_text("\0".join(texts))
    base = LlamaForCausalLM.from_pretrained(folder / "my-checkpoint")
    get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", level=4)).save_pretrained(folder / "my-adapter")
    return folder


@pytest.mark.parametrize("page", python_pages(), ids=name_of)
def test_python_blocks_run(page, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    names = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), 1):
        # Sizes in the pages are those of real use.
        code = re.sub(r"(_steps)=\d+", r"\1=2", code).replace("length=2048", "length=160").replace("length=4096", "length=160")
        code = code.replace("batch_size=8", "batch_size=2").replace("learning_rate=1e-3,", "learning_rate=1e-3, use_cpu=True,")
        code = code.replace("longest=8192, count=24", "longest=600, count=3").replace(".blocks[:16]", ".blocks[:4]")
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_hold_only_blocks_that_are_tried_and_links_that_exist(page):
    for language, code in BLOCK.findall(page.read_text()):
        assert language in ("python", "console", "text"), f"{page.name}: a block of {language!r} is not run"
        if language == "console":
            for line in filter(None, re.sub(r"\\\n\s*", " ", code).splitlines()):
                assert line.startswith(COMMANDS), f"{page.name}: {line!r} is not run by any test"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_pages_name_exist(page):
    for path in re.findall(r"`((?:\.ci|docs|eval|examples|kernels|src|tests)/[\w./-]+)`", page.read_text()):
        assert (REPOSITORY / path).exists(), f"{page.name} names {path}, which is not there"
