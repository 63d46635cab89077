"""Model cards: what a stranger who finds the directory reads, and whether the code in it runs."""

import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.evaluation.levels import cache_bytes_per_sequence
from dsla_hf.models.cards import adapter_card, hybrid_card
from dsla_hf.models.configuration import FORMAT_VERSION


@pytest.fixture
def config():
    return DSLAConfig(
        conversion_order=[3, 1, 2],
        level=2,
        window_size=8,
        base_model_type="llama",
        base_model_name_or_path="someone/base-7b",
    )


def code_of(card):
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


def table_of(card):
    rows = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_first_line_of_code_imports_the_package(kind, config):
    card = adapter_card(config) if kind == "adapter" else hybrid_card(config)
    lines = code_of(card).splitlines()
    assert lines[0].startswith("import dsla_hf")
    ast.parse(code_of(card))
    assert any("from_pretrained(" in line for line in lines)
    assert not re.search(r"[{}]", card.replace(code_of(card), "")), "a placeholder was left"


@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_first_line_of_text_says_that_the_package_is_needed(kind, config):
    text = ModelCard(adapter_card(config) if kind == "adapter" else hybrid_card(config)).text.strip()
    first = text.split("\n\n")[0]
    assert text.splitlines()[0].startswith("Needs the package: `pip install dsla-hf`, and `import dsla_hf`")
    assert ("KeyError: 'DSLA'" if kind == "adapter" else "LlamaForCausalLM") in first


@pytest.mark.parametrize(
    "task, auto_class, tag", [("FEATURE_EXTRACTION", "AutoModel", "feature-extraction"), (None, "AutoModelForCausalLM", "text-generation")]
)
def test_card_of_an_adapter_names_the_class_of_its_task(config, task, auto_class, tag):
    config.task_type = task
    card = adapter_card(config)
    assert f"model = {auto_class}.from_pretrained(" in code_of(card) and ModelCard(card).data.pipeline_tag == tag


def test_header_of_an_adapter(config):
    data = ModelCard(adapter_card(config)).data
    assert data.base_model == "someone/base-7b"
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert "dsla" in data.tags


def test_header_of_a_hybrid(config):
    data = ModelCard(hybrid_card(config)).data
    assert data.library_name == "transformers" and data.base_model == "someone/base-7b"
    config.base_model_name_or_path = None
    assert ModelCard(hybrid_card(config)).data.base_model == "a llama model"


def test_adapter_card_tells_base_plan_level_and_usage(config):
    card = adapter_card(config)
    assert "# DSLA adapter for someone/base-7b" in card
    assert "layers 3, 1, 2 of" in card and "Saved at level 2" in card and "Window size 8" in card and f"format {FORMAT_VERSION}" in card
    code = code_of(card)
    assert 'AutoModelForCausalLM.from_pretrained("someone/base-7b")' in code
    assert "model.set_level(2)  # 0 to 3" in code


def test_card_without_measurements_has_no_table(config):
    assert table_of(adapter_card(config)) == []


def test_layers_are_listed_once_with_their_scores_however_deep_the_model(config):
    config.conversion_order = list(range(99, -1, -1))
    config.order_scores = {str(layer): 0.001 * (100 - layer) for layer in range(100)}
    config.level_metrics = {str(level): {"perplexity": 9.0} for level in (0, 50, 100)}
    card = adapter_card(config)
    assert "weights for layers 99 (0.001), 98 (0.002), 97 (0.003)" in card and "the measured harm" in card
    assert card.count("98 (") == 1 and len(table_of(card)) == 2 + 3


def test_level_table_shows_what_was_measured(config):
    config.level_metrics = {"2": {"perplexity": 24.123456, "recall": 0.5}, "0": {"perplexity": 23.0}}
    assert table_of(adapter_card(config)) == [
        ["level", "perplexity", "recall"],
        ["---", "---", "---"],
        ["0", "23", ""],
        ["2", "24.12", "0.5"],
    ]


def test_card_says_what_is_wrong_with_a_level(config):
    good = {"perplexity": 23.5, "untrained_perplexity": 30.0, "kl": 0.01, "untrained_kl": 0.3, "answers": 0.95, "bytes_1k": 4096}
    config.level_metrics = {"0": {"perplexity": 23.0, "kl": 0.0}, "1": good}
    assert "**" not in adapter_card(config)
    config.level_metrics |= {"2": {**good, "kl": 0.4}, "3": {**good, "answers": 0.1}}
    card = adapter_card(config)
    assert "**Level 2 is worse than the untrained layer.**" in card and "**Level 3 is wrong in short chats (" in card
    assert table_of(card)[0] == [
        *("level", "perplexity", "perplexity untrained", "KL to level 0", "KL untrained", "same tokens in short answers"),
        "cache at 1k tokens",
    ]
    assert table_of(card)[3] == ["1", "23.5", "30", "0.01", "0.3", "95%", "4 KiB"]


def test_hybrid_card_tells_layers_and_both_ways_to_load(config):
    card = hybrid_card(config)
    assert "# Hybrid of someone/base-7b" in card
    assert "Layers 1, 3 are Dual-State" in card, "at level 2 of the plan 3, 1, 2"
    assert "trust_remote_code=True" in card and "Window size 8" in card and "llama base" in card


def test_cards_without_a_name_of_the_base_still_say_what_it_is(config):
    config.base_model_name_or_path = None
    assert "a llama model" in adapter_card(config)


def test_level_metrics_reach_the_saved_card(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"))
    model.peft_config["default"].level_metrics = {"1": {"perplexity": 31.25}}
    model.save_pretrained(tmp_path)
    assert ["1", "31.25"] in table_of((tmp_path / "README.md").read_text())
    assert DSLAConfig.from_pretrained(tmp_path).level_metrics == {"1": {"perplexity": 31.25}}


def test_the_code_of_saved_cards_runs(base_kind, tiny_model, adapter_model, tmp_path):
    tiny_model(base_kind).save_pretrained(tmp_path / "base")
    model = adapter_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), level=2)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for kind, placeholder in (("adapter", "path/to/this/adapter"), ("hybrid", "path/to/this/model")):
        code = code_of((tmp_path / kind / "README.md").read_text())
        assert placeholder in code
        names: dict = {}
        exec(code.replace(placeholder, str(tmp_path / kind)), names)
        with torch.no_grad():
            assert torch.equal(names["model"].eval()(ids).logits, expected), kind


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved_heads(tiny_model, adapter_model, tmp_path):
    """The cards of an adapter at a level between two layers, of 8 KV heads, and of its hybrid."""
    plan = [[2, 0], [0, 1], [2, 1], [3, 0], [0, 0]]
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=plan, level=3)
    model.peft_config["default"].order_scores = {f"{layer}.{head}": 0.25 for layer, head in plan}
    sizes = [cache_bytes_per_sequence(model, tokens) for tokens in (2048, 8192, 32768)]
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    return *((tmp_path / kind / "README.md").read_text() for kind in ("adapter", "hybrid")), sizes


def test_cards_of_heads_show_which_are_kept_and_what_the_cache_takes(saved_heads):
    *cards, sizes = saved_heads
    for card in cards:
        assert "At level 3, 5 of 8 KV heads (62.5%) are kept" in card
        assert "```text\nlayer      0\nKV head 0  ##.#\nKV head 1  .#.#\n```" in card
        head, _, original, level = table_of(card)
        assert head == ["level", "KV heads kept", "at 2k tokens", "at 8k tokens", "at 32k tokens"]
        assert original[:3] == ["0", "8 (100%)", "1,024 KiB"], "4 layers of 2 KV heads, keys and values of 8 float32 for 2,048 tokens"
        assert level == ["3", "5 (62.5%)", *(f"{size / 1024:,.0f} KiB" for size in sizes)]
        assert "(float32)" in card and not re.search(r"[{}]", card.replace(code_of(card), ""))
    assert "3 KV heads with their query heads are Dual-State" in cards[1]


def test_card_of_an_adapter_of_heads_does_not_list_them(saved_heads):
    card = saved_heads[0]
    assert "weights for 5 KV heads of 3 layers of" in card and "0.25" not in card and "3.0" not in card
    assert "model.set_level(3)  # 0 to 5" in code_of(card)


def test_bytes_stand_once_where_the_level_was_measured(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=None, level=7)
    config = model.peft_config["default"]
    config.level_metrics = {"7": {"kept": 1, "perplexity": 31.0, "bytes_2k": 2048, "bytes_8k": 4096, "bytes_32k": 8192}}
    card = adapter_card(config, model.get_base_model())
    assert table_of(card) == [
        ["level", "KV heads kept", "perplexity", *(f"cache at {length} tokens" for length in ("2k", "8k", "32k"))],
        ["---"] * 6,
        ["7", "1 (12.5%)", "31", "2 KiB", "4 KiB", "8 KiB"],
    ]
    assert "KV head 1  ...#" in card


def test_cards_of_layers_say_nothing_of_heads(config, tiny_model):
    assert adapter_card(config, tiny_model("llama")) == adapter_card(config)
    assert "head" not in adapter_card(config) and "head" not in hybrid_card(config, tiny_model("llama"))
