"""Whether short answers survive a conversion: a few questions, answered at every level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from ..models.adapter import get_level, set_level
from ..training.losses import kl_loss

# Asked after a training: what anybody asks first, with answers that a small model can give.
QUESTIONS = (
    "What is the capital of France?",
    "What is 12 plus 7?",
    "Name three colours of the rainbow.",
    "Which animal says meow?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS = 48  # of level 0, compared at every level
SAMPLE_TOKENS = 16  # of each level's own answer to the first question: half a line, and a second or so on a CPU
SAMPLE_WIDTH = 100  # characters


@dataclass(frozen=True)
class ShortAnswers:
    """scores: for each level `answers`, the share of level 0's tokens that it picks too where the ones before are given;
    `answers_kl`, KL(level 0 || level) on them in nats per token; and `own_answer`, the share of tokens that the beginnings of its own
    answer to `question` and of level 0's have in common. samples: each level's own answer to `question`, cut to a line."""

    question: str
    scores: dict[int, dict[str, float]]
    samples: dict[int, str]


@torch.no_grad()
def measure_answers(model: PeftModel, tokenizer: Any, levels: Iterable[int]) -> ShortAnswers:
    """Ask short questions, as every chat begins: text of the length that training packs says nothing of them.

    Level 0 answers each question greedily, by at most 48 tokens. Every process of a distributed run calls this alike.

    Args:
        model: a PEFT model with a DSLA adapter; it is afterwards at the level and in the mode that it was in.
        tokenizer: with a chat template.
        levels: levels of the plan.
    """
    levels, before, training = list(levels), get_level(model), model.training
    prompts = [_prompt(tokenizer, question) for question in QUESTIONS]
    stop = _stop_tokens(model, tokenizer)
    model.eval()
    try:
        set_level(model, 0)
        answers = _greedy(model, prompts, ANSWER_TOKENS, stop)
        inputs, learnt = _whole_chats(prompts, answers, model.device)
        teacher = model(**inputs, use_cache=False).logits
        scores, samples = {}, {}
        for level in levels:
            set_level(model, level)
            logits = teacher if level == 0 else model(**inputs, use_cache=False).logits
            same = (logits[:, :-1].argmax(-1) == inputs["input_ids"][:, 1:]) & learnt[:, :-1].bool()
            kl = 0.0 if level == 0 else kl_loss(logits, teacher, learnt).item()
            sample = answers[0] if level == 0 else _greedy(model, prompts[:1], SAMPLE_TOKENS, stop)[0]
            own = _in_common(sample[:SAMPLE_TOKENS], answers[0][:SAMPLE_TOKENS])
            scores[level] = {"answers": same.sum().item() / learnt.sum().item(), "answers_kl": kl, "own_answer": own}
            samples[level] = _line(tokenizer.decode(sample, skip_special_tokens=True))
    finally:
        set_level(model, before)
        model.train(training)
    return ShortAnswers(QUESTIONS[0], scores, samples)


def _prompt(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    settings = getattr(model.get_base_model(), "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    return {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}


def _greedy(model: Any, prompts: list[list[int]], tokens: int, stop: set[int]) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and with the first of the `stop` tokens.

    Not by `generate`, which goes around the forward of the outermost module, where FSDP gathers weights.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    cache, answers = DynamicCache(config=model.get_base_model().config), [[] for _ in prompts]  # type: ignore[var-annotated]
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    for _ in range(tokens):
        output = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = broadcast(output.logits[:, -1].argmax(-1, keepdim=True))  # rounding may differ between processes, which must go on alike
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            if not answer or answer[-1] not in stop:
                answer.append(token)
        if all(answer[-1] in stop for answer in answers):
            break
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], -1)
        position = position[:, -1:] + 1
    return answers


def _whole_chats(prompts: list[list[int]], answers: list[list[int]], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts and answers as a batch padded at its end, and `[B, T]`, 1 where the next token is one of the answer."""
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids, mask, learnt = (torch.zeros(len(prompts), longest, dtype=torch.long, device=device) for _ in range(3))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer], device=device)
        mask[row, :end] = 1
        learnt[row, len(prompt) - 1 : end - 1] = 1
    return {"input_ids": ids, "attention_mask": mask}, learnt


def _in_common(one: list[int], other: list[int]) -> float:
    """The share of the shorter one's tokens that the other has too, wherever: a word less or more makes no other answer."""
    return sum((Counter(one) & Counter(other)).values()) / min(len(one), len(other))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_WIDTH else text[: SAMPLE_WIDTH - 1] + "…"
