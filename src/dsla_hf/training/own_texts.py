"""Training texts that a checkpoint writes itself, where no others are at hand: it is distilled on what it says.

A base model goes on from the beginning of a text, or from one random token behind it (as in LLM-QAT, arXiv 2305.17888). A chat model is
given its template up to where the user speaks, asks a question, and answers it (as in Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import write_whole
from ..core.progress import bar, on_terminal, say
from ..inference.batching import halve_until_it_fits
from ..inference.graph import GraphDecoder

TOKENS_AT_ONCE = {"cuda": 1_048_576, "cpu": 16_384}  # of all texts of a batch, at most
QUESTION_TOKENS = 512  # of a chat, at most; a question that is not at its end then is dropped
CHAT_TOKENS = 2048  # with its answer; the few that would go on repeat themselves, and the others would wait for them
DIGESTED = 64  # numbers of each weight, by which a model is known again
LINES = 10  # about progress, where no bar can be
PLACE = "\x02HERE\x02"  # stands for the user's words in a template


def write_own_texts(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    tokens: int,
    *,
    length: int = 2048,
    chat: bool | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Path:
    """Have a model write texts into a `.jsonl` file, until they have so many tokens: lines with `text`, or with `messages` of a chat.

    The file is written batch by batch. One that is there already is gone on with, behind its last whole batch, and in the end is the same
    as if it had not been interrupted. The last line of each batch names the model and its weights, which must be the same then. On a GPU
    steps are replayed from CUDA graphs.

    Args:
        model: causal LM, at the level that shall speak (0: the original).
        tokens: of all texts together, prompts included.
        length: tokens of a text, at most; of a chat never more than CHAT_TOKENS.
        chat: whether it asks and answers in the tokenizer's chat template. None: where there is one.
        temperature: of the draws; 1 is the model's own distribution.
        batch: texts at once. None: by the device, fewer where its memory is too small.
        name: of the model; of one in a folder the folder's. None: that which it was loaded by.

    Returns:
        the path of the file.

    Raises:
        ValueError: if a number is out of range, the template does not show the user's words, a file that is there has texts of another
            model or other settings, or the model writes nothing.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    name = str(getattr(model.config, "name_or_path", "")) if name is None else name
    settings = _settings(tokenizer, model.device.type, tokens, length, chat, temperature, seed, batch, name)
    at_once = settings["batch"]
    settings["weights"] = _digest(model)
    done, number = _begun(path, settings)
    generate = _Generate(model, tokenizer, temperature)
    write = _chats if settings["chat"] else _texts
    training = model.training
    model.eval()
    try:
        with bar(total=tokens, initial=min(done, tokens), desc="writing texts", unit=" tokens", shown=progress) as shown:
            empty, told = 0, done
            while done < tokens:
                with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                    torch.manual_seed(random.Random(f"{seed}/{number}").getrandbits(63))
                    rows = write(generate, tokenizer, at_once, settings["length"])
                empty = 0 if rows else empty + 1
                if empty == 3:
                    raise ValueError("the model writes no texts: three batches were empty, so give --data other texts")
                added = sum(row.pop("tokens") for row in rows)
                _append(path, settings, number, added, rows)
                shown.update(min(added, max(0, tokens - done)))
                done, number = done + added, number + 1
                if progress and not on_terminal() and (done - told >= tokens / LINES or done >= tokens):
                    say(f"writing texts: {min(done, tokens):,} of {tokens:,} tokens")
                    told = done
    finally:
        model.train(training)
    return path


def tokens_left(
    path: str | Path,
    tokens: int,
    tokenizer: Any,
    device: str,
    *,
    length: int = 2048,
    chat: bool | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    name: str = "",
) -> int:
    """How many tokens `write_own_texts` would still write into a file: 0 where it is whole, and no model is needed. Nothing is changed.

    Args:
        device: type of the model's, "cuda" or "cpu"; the others are those of `write_own_texts`.

    Raises:
        ValueError: if a number is out of range, or the file has texts of a model of another name, or other settings.
    """
    settings = _settings(tokenizer, device, tokens, length, chat, temperature, seed, batch, name)
    path = Path(path)
    done = _whole_batches(path, path.read_bytes(), settings)[0] if path.exists() else 0
    return max(0, tokens - done)


def _settings(
    tokenizer: Any, device: str, tokens: int, length: int, chat: bool | None, temperature: float, seed: int, batch: int | None, name: str
) -> dict[str, Any]:
    """What texts depend on beside the model's weights; raises ValueError for a number out of range."""
    if tokens < 1 or length < 8:
        raise ValueError(f"tokens must be 1 or more and length 8 or more, got {tokens} and {length}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be 1 or more, or None, got {batch}")
    chat = tokenizer.chat_template is not None if chat is None else chat
    length = min(length, CHAT_TOKENS) if chat else length
    at_once = batch or max(1, TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cpu"]) // length)
    own = Path(name).resolve().name if Path(name).exists() else name  # a folder may be moved, or named from elsewhere
    return {"model": own, "chat": chat, "length": length, "temperature": temperature, "seed": seed, "batch": at_once}


def _digest(model: Any) -> str:
    """Of some of every weight of a model, as it is loaded: another model, or another version of it, has another one."""
    some = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, Tensor):
            some.update(f"{name} {list(weight.shape)} ".encode())
            some.update(weight.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return some.hexdigest()[:16]


# --- the file ---------------------------------------------------------------------------------------------------


def _begun(path: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Tokens and batches that the file has whole; what lies behind them is cut off."""
    if not path.exists():
        return 0, 0
    content = path.read_bytes()
    done, number, whole = _whole_batches(path, content, settings)
    if whole < len(content):
        write_whole(path, content[:whole])
    return done, number


def _whole_batches(path: Path, content: bytes, settings: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens and batches that a file's content has whole, and how many bytes they take."""
    done, number, whole, begin = 0, 0, 0, 0
    while (end := content.find(b"\n", begin)) >= 0:
        try:
            row = json.loads(content[begin:end])
        except ValueError:
            break
        begin = end + 1
        if isinstance(row, dict) and {"last_of_batch", "tokens_of_batch"} <= row.keys():
            _check_settings(path, row.get("settings"), settings)
            done, number, whole = done + row["tokens_of_batch"], row["last_of_batch"] + 1, begin
    if content and not whole:  # the first batch comes with the file: this is none of ours, and would be lost
        raise ValueError(f"{path} holds something else than texts written here: name another file, or remove it")
    return done, number, whole


def _check_settings(path: Path, there: Any, settings: dict[str, Any]) -> None:
    """Raises ValueError if texts of a file were not written with these settings."""
    there = there if isinstance(there, dict) else {}
    other = [name for name, value in settings.items() if there.get(name) != value]
    if other:
        told = ", ".join(f"{name} {there.get(name)!r}, not {settings[name]!r}" for name in other)
        raise ValueError(f"{path} has texts written with {told}: name another file, or remove it")


def _append(path: Path, settings: dict[str, Any], number: int, tokens: int, rows: list[dict[str, Any]]) -> None:
    """A batch of texts; its last line says that it is whole."""
    if not rows:
        return
    last = {"last_of_batch": number, "tokens_of_batch": tokens, "settings": settings}
    rows = [*rows[:-1], {**rows[-1], **last}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.stat().st_size:
        write_whole(path, text)
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# --- what is written --------------------------------------------------------------------------------------------


class _Generate:
    """Draws continuations of prompts: of each its tokens, and whether it came to an end."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float):
        self.decoder = GraphDecoder(model) if model.device.type == "cuda" else model
        self.device, self.temperature = model.device, temperature
        self.words = min(len(tokenizer), len(model.get_input_embeddings().weight))  # a tokenizer may have more than the model
        own = model.generation_config.eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else list(own)
        self.ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        self.pad = next((token for token in (tokenizer.pad_token_id, *self.ends) if token is not None), 0)

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], bool]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)

        def run(size: int) -> list[Tensor]:
            return [row for part, seen in zip(ids.split(size), mask.split(size), strict=True) for row in self._draw(part, seen, new_tokens)]

        rows = halve_until_it_fits(run, len(prompts), "writing texts")
        return [self._until_the_end(row.tolist()) for row in rows]

    def _draw(self, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        """As the model's own distribution has it, whatever its generation config says."""
        plain: dict[str, Any] = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        plain |= {"eos_token_id": self.ends or None, "pad_token_id": self.pad}
        return self.decoder.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **plain)[:, ids.shape[1] :].cpu()

    def _until_the_end(self, tokens: list[int]) -> tuple[list[int], bool]:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        return (tokens, False) if end is None else (tokens[:end], True)


def _texts(generate: _Generate, tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    """Texts from their beginning; every second one from a random token."""
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *generate.ends) if token is not None), None)
    begun = [] if first is None else [first]
    special = set(tokenizer.all_special_ids)
    prompts = []
    for place in range(count):
        prompt = list(begun)
        while place % 2 or not prompt:
            token = int(torch.randint(generate.words, ()))
            if token not in special:
                prompt.append(token)
                break
        prompts.append(prompt)
    rows = []
    for prompt, (tokens, _) in zip(prompts, generate(prompts, length - 2), strict=True):
        text = tokenizer.decode(prompt[len(begun) :] + tokens, skip_special_tokens=True)
        if text.strip():
            rows.append({"text": text, "tokens": len(prompt) + len(tokens)})
    return rows


def _chats(generate: _Generate, tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    """Chats of a question and its answer."""
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False)
    before, found, _ = rendered.partition(PLACE)
    if not found:
        raise ValueError("the chat template does not show what the user writes: give --data other texts")
    begun = encode(before)
    room = length - len(begun) - 8
    if room < 8:
        raise ValueError(f"length {length} is too short for chats, whose template takes {len(begun)} tokens: take a longer one")
    asked = generate([begun] * count, min(QUESTION_TOKENS, room // 2))
    questions = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, ended in asked if ended]
    questions = [question for question in questions if question]
    if not questions:
        return []
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
    rows = []
    answers = generate(prompts, max(8, length - max(map(len, prompts))))
    for chat, prompt, (tokens, _) in zip(chats, prompts, answers, strict=True):
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if answer:
            rows.append({"messages": [*chat, {"role": "assistant", "content": answer}], "tokens": len(prompt) + len(tokens)})
    return rows
