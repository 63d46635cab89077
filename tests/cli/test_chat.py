"""`dsla generate --chat`: what a chat model reads, when it stops, conversations, and what is refused."""

import io
import re

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsla_hf import DSLAConfig
from dsla_hf.cli.generate import generate

WORDS = [f"w{i}" for i in range(60)]
MARKS = ["<system>", "<user>", "<assistant>", "<end>", "<pad>", "<unk>"]
TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
TURNS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def save_tokenizer(folder, eos="<end>", template=TEMPLATE):
    """A word is a token, so that an answer is read as it was written."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *MARKS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def made(tmp_path):
    """Folders `base`, `adapter` (at level 2, weights away from their start) and `hybrid`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=66, initializer_range=0.3, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        base.lm_head.weight[60:] = 0  # words only
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8, level=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for name in ("base", "hybrid"):
        save_tokenizer(tmp_path / name)
    return tmp_path


def by_hand(folder, adapter, level, text, max_new_tokens=6):
    """The answer of a model that reads the whole conversation anew."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
        model.set_level(level)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    out = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=63, pad_token_id=64)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_prompt_is_a_turn_of_the_user(made, capsys):
    base = str(made / "base")
    answer = generate(base, None, None, "w1 w2", chat=True, system="w9", max_new_tokens=6)
    assert answer == by_hand(base, None, None, "<system> w9 <end> <user> w1 w2 <end> <assistant>") != ""
    assert capsys.readouterr().out.split() == answer.split()
    assert answer != generate(base, None, None, "w1 w2", max_new_tokens=6), "without --chat the text goes on as it is"


@pytest.mark.parametrize("kind, level", [("base", None), ("adapter", 0), ("adapter", 2), ("adapter", "100%"), ("hybrid", None)])
def test_a_conversation_answers_every_line_with_all_before_it(made, kind, level, monkeypatch, capsys):
    folder, adapter = str(made / ("base" if kind == "adapter" else kind)), str(made / "adapter") if kind == "adapter" else None
    read = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda self, *args, **kw: (read.append(kw["input_ids"].shape[1]), forward(self, *args, **kw))[1]
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(TURNS) + "\n"))
    last = generate(folder, adapter, level, None, chat=True, max_new_tokens=6)
    monkeypatch.undo()
    answers, text = [line for line in capsys.readouterr().out.split("\n") if line], ""
    assert len(answers) == len(TURNS) and answers[-1].strip() == last.strip()
    for turn, answer in zip(TURNS, answers, strict=True):
        text += f" <user> {turn} <end> <assistant>"
        expected = by_hand(folder, adapter, 4 if level == "100%" else level, text)
        assert answer.strip() == expected.strip() and expected
        text += f" {expected} <end>"
    prompts = [tokens for tokens in read if tokens > 1]
    assert len(prompts) == 3 and max(prompts[1:]) < 12, f"what was read before comes from the cache: {prompts}"


def test_answers_that_the_template_writes_anew_are_read_anew(made, monkeypatch, capsys):
    """As of models that think: the template leaves a part of the answer out."""
    base = str(made / "base")
    save_tokenizer(made / "base", template=TEMPLATE.replace("m.content +", "(m.content if m.role == 'user' else m.content.split()[-1]) +"))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TURNS[:2])))
    generate(base, None, None, None, chat=True, max_new_tokens=6)
    first, second = [line for line in capsys.readouterr().out.split("\n") if line]
    text = f"<user> {TURNS[0]} <end> <assistant> {first.split()[-1]} <end> <user> {TURNS[1]} <end> <assistant>"
    assert second.strip() == by_hand(base, None, None, text)


def test_answers_end_where_the_tokenizer_says_that_turns_end(made):
    """Base checkpoints are often tuned into chat models whose turns end with another token than generation_config.json has."""
    base = str(made / "base")
    whole = generate(base, None, None, "w1 w2", chat=True, max_new_tokens=6).split()
    at = next(i for i in range(1, 6) if whole[i] not in whole[:i] and whole[i] in WORDS)
    save_tokenizer(made / "base", eos=whole[at])
    assert generate(base, None, None, "w1 w2", chat=True, max_new_tokens=6).split() == whole[:at]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompt": "w1", "system": "w2"}, "--system begins a conversation: give --chat"),
        ({"prompt": None}, "there is no prompt: give --prompt or --prompt-file, or --chat"),
        ({"prompt": " ", "chat": True}, "the prompt is empty"),
        ({"prompt": "w1", "chat": True, "system": "w2"}, "does not take the conversation: System role not supported; .* no --system"),
    ],
    ids=str,
)
def test_refused_before_weights_are_read(made, options, words):
    save_tokenizer(made / "base", template=NO_SYSTEM)
    (made / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=words):
        generate(str(made / "base"), None, None, **options)


def test_no_chat_template(made):
    save_tokenizer(made / "base", template=None)
    (made / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base has no chat template.* give --prompt without --chat"):
        generate(str(made / "base"), None, None, None, chat=True)


def test_ctrl_c_in_the_middle_of_an_answer(made, monkeypatch):
    class Interrupted(io.StringIO):
        def write(self, text):
            if re.search(r"\w", text) and not text.startswith("nothing"):
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    monkeypatch.setattr("sys.stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt, match="nothing is kept of a conversation"):
        generate(str(made / "base"), None, None, None, chat=True)
