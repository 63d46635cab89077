"""Short answers at each level: level 0's own, given token by token, and what each level says by itself."""

import pytest
import torch

from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation import short_answers
from dsla_hf.evaluation.short_answers import measure_answers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([" ".join(short_answers.QUESTIONS) * 3], vocab_size=300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(base_kind, tiny_model, adapter_model, tokenizer):
    base = tiny_model(base_kind)
    base.resize_token_embeddings(len(tokenizer))
    return adapter_model(base, level=3).train()


@torch.no_grad()
def test_answers_by_hand(model, tokenizer, monkeypatch):
    monkeypatch.setattr(short_answers, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(short_answers, "SAMPLE_TOKENS", 4)
    found = measure_answers(model, tokenizer, [0, 4])
    assert model.get_level() == 3 and model.training
    model.eval()
    kept = divergence = total = 0
    for number, question in enumerate(short_answers.QUESTIONS):
        prompt = tokenizer(f"user: {question}\nassistant: ", return_tensors="pt").input_ids
        model.set_level(0)
        whole = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answer = slice(prompt.shape[1] - 1, whole.shape[1] - 1)
        teacher = model(whole).logits[0, answer].log_softmax(-1)
        model.set_level(4)
        student = model(whole).logits[0, answer].log_softmax(-1)
        kept += (student.argmax(-1) == whole[0, prompt.shape[1] :]).sum().item()
        divergence += (teacher.exp() * (teacher - student)).sum().item()
        total += len(student)
        if number == 0:
            own = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            assert found.samples[4] == " ".join(tokenizer.decode(own[0, prompt.shape[1] :], skip_special_tokens=True).split())
    assert found.scores[0] == {"answers": 1.0, "answers_kl": 0.0, "own_answer": 1.0}
    own = found.scores[4].pop("own_answer")
    assert own in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.scores[4] == {"answers": pytest.approx(kept / total), "answers_kl": pytest.approx(divergence / total, rel=1e-4)}
    assert 0 < kept < total, "else this test tells nothing"


def test_own_answers_are_compared_by_their_tokens_wherever_they_stand():
    assert short_answers._in_common([1, 2, 3, 4], [9, 1, 2, 3, 4, 5]) == 1  # the same with a word more
    assert short_answers._in_common([7, 7, 7, 1], [1, 2, 3, 7]) == 0.5  # babble that repeats a token has it once in common
    assert short_answers._in_common([5, 6], [1, 2, 3]) == 0


def test_answers_end_at_the_stop_token_and_fill_one_line(model, tokenizer, monkeypatch):
    prompt = tokenizer("user: x", return_tensors="pt").input_ids[0].tolist()
    whole = short_answers._greedy(model, [prompt], 6, set())[0]
    assert len(whole) == 6 and short_answers._greedy(model, [prompt], 6, {whole[2]})[0] == whole[: whole.index(whole[2]) + 1]
    assert short_answers._line("a\n b" * 200).startswith("a b") and len(short_answers._line("a\n b" * 200)) == 100
