"""The long-context tasks: what is written into them, that it is asked for, and what models score that know the answers or do not."""

import itertools
import logging
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation import long_context
from dsla_hf.evaluation.long_context import PROMPTS, TASKS, Haystack, Writer, last_seen, prepare, read_haystack, run_tasks, token_losses

TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(400, 0, -1))
LENGTH, SAMPLES = 400, 6
WORDS = " ".join(
    [long_context.FACT, long_context.OTHER_FACT, long_context.QUESTION, long_context.ASSIGNMENT, long_context.ASKED, *long_context.NAMES]
)


@pytest.fixture(scope="module")
def tokenizer():
    """Merges over the facts' words, none over digits."""
    return train_tokenizer([re.sub(r"\d", "", TEXT), WORDS], vocab_size=800)


@pytest.fixture(scope="module")
def haystack(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hay.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tasks(tokenizer, haystack):
    return {task.name: task for task in prepare(tokenizer, TASKS, [LENGTH], SAMPLES, haystack=haystack)}


class Oracle(nn.Module):
    """Answers by `answer(text so far)`, in text; every forward puts the next token of a known continuation first."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.tokenizer, self.answer, self.device, self.batches = tokenizer, answer, torch.device("cpu"), []

    def generate(self, input_ids, max_new_tokens, **kwargs):
        self.batches.append(len(input_ids))
        rows = [self.tokenizer.encode(self.answer(self.tokenizer.decode(row)), add_special_tokens=False) for row in input_ids.tolist()]
        rows = [(row + [self.tokenizer.pad_token_id] * max_new_tokens)[:max_new_tokens] for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def said(text):
    """What the text says the special number of the name asked for is."""
    name = re.search(r"special number for (\S+) is$", text)[1]
    numbers = re.findall(rf"The special number for {name} is (\d+)\. Remember", text)
    assert len(numbers) == 1
    return f" {numbers[0]}. And so on"


def assigned(text):
    """The value of the variable asked for, by following the assignments."""
    values = dict(re.findall(r"Set (\w+) = (\w+)\.", text))
    name, hops = re.search(r"The value of (\w+) is$", text)[1], 0
    while name in values:
        name, hops = values[name], hops + 1
    assert hops == long_context.HOPS + 1 and len(values) == 2 * hops
    return f" {name}."


# --- what the tasks hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_exact_and_a_seed_gives_the_same(name, tokenizer, haystack, tasks):
    def ids(task):
        if name in PROMPTS:
            return [prompt.input_ids for prompt in task.data]
        return (task.data[0] if name == "associative_recall" else task.data).tolist()

    rows = ids(tasks[name])
    assert [len(row) for row in rows] == [LENGTH] * SAMPLES and len({tuple(row) for row in rows}) == SAMPLES
    alone, other = (prepare(tokenizer, [name], [LENGTH], SAMPLES, seed=seed, haystack=haystack)[0] for seed in (0, 1))
    assert ids(alone) == rows, "the other tasks have no say"
    assert (ids(other) == rows) == (name in ("position_perplexity", "far_bigrams"))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_hold_their_answer(name, tokenizer, tasks):
    solve = assigned if name == "variable_tracking" else said
    prompts = tasks[name].data
    for prompt in prompts:
        text = tokenizer.decode(prompt.input_ids)
        assert solve(text).startswith(f" {prompt.answer}.")
        fact = f"= {prompt.answer}." if name == "variable_tracking" else f"is {prompt.answer}. Remember it."
        assert text.count(fact) == 1 and prompt.new_tokens > len(tokenizer.tokenize(f" {prompt.answer}"))
    assert [prompt.depth for prompt in prompts] == sorted(prompt.depth for prompt in prompts)
    assert all(i / SAMPLES <= prompt.depth < (i + 1) / SAMPLES for i, prompt in enumerate(prompts))


def test_facts_stand_at_their_depths(tokenizer, haystack):
    texts = [tokenizer.decode(prompt.input_ids) for prompt in prepare(tokenizer, ["needle"], [1600], 8, haystack=haystack)[0].data]
    places = [text.index("Remember it") / len(text) for text in texts]
    assert places == sorted(places) and places[0] < 0.2 and places[-1] > 0.8


def test_several_needles_and_distractors(tokenizer, tasks):
    for prompt in tasks["needle_several"].data:
        facts = re.findall(r"special number for (\S+) is (\d+)\. Rem", tokenizer.decode(prompt.input_ids))
        assert len(dict(facts)) == long_context.SEVERAL
    for prompt in tasks["needle_distractors"].data:
        text = tokenizer.decode(prompt.input_ids)
        name = re.search(r"special number for (\S+) is$", text)[1]
        others = [other for other in re.findall(r"special number for (\S+) is \d+\. Rem", text) if other != name]
        assert len(others) == long_context.DISTRACTORS - 1 and all(set(name.split("-")) & set(other.split("-")) for other in others)
        assert re.search(rf"ordinary number for {name} is (\d+)", text)[1] != prompt.answer


def test_chains_are_assigned_in_order(tokenizer, tasks):
    for prompt in tasks["variable_tracking"].data:
        known = set()
        for name, value in re.findall(r"Set (\w+) = (\w+)\.", tokenizer.decode(prompt.input_ids)):
            assert value.isdigit() or value in known
            known.add(name)


def test_recall_marks_the_answers(tokenizer, tasks):
    ids, marks = tasks["associative_recall"].data
    assert ids.shape == (SAMPLES, LENGTH) and marks.shape == (SAMPLES, LENGTH - 1)
    for row, marked in zip(ids, marks, strict=True):
        text = tokenizer.decode(row)
        facts = dict(re.findall(r"The special number for (\S+) is (\d+)\. Rem", text))
        asked = re.findall(r"\? The special number for (\S+) is (\d+)", text)
        assert len(facts) == long_context.PAIRS and len(dict(asked)) == long_context.QUERIES
        answers = [tokenizer.decode(row[1:][marked == query]).strip() for query in range(1, long_context.QUERIES + 1)]
        assert answers == [number for _, number in asked] == [facts[name] for name, _ in asked]


def test_beginning_of_text_where_the_tokenizer_has_one(tokenizer, haystack):
    bos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<eos>")
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", bos.bos_token_id)])
    assert Writer(tokenizer).prefix == [] and Writer(bos).prefix == [bos.bos_token_id]
    for task in prepare(bos, TASKS, [LENGTH], 2, haystack=haystack):
        rows = (
            [p.input_ids for p in task.data]
            if task.name in PROMPTS
            else torch.as_tensor(task.data[0] if isinstance(task.data, tuple) else task.data)
        )
        for row in rows:
            assert len(row) == LENGTH and list(row).count(bos.bos_token_id) == 1 and row[0] == bos.bos_token_id


def test_tokenizer_that_merges_answer_and_question():
    """The answer begins where the tokens of question and answer part from those of the question alone."""

    def merging(text, **kwargs):
        return {"input_ids": [ord(c) for c in text.replace("s 1", "\x01")]}

    writer = SimpleNamespace(encode=lambda text: merging(text)["input_ids"])
    question, answer = Writer.question(writer, "it is", "123")
    assert question == [ord(c) for c in "it i"] and answer == [1, ord("2"), ord("3")]


# --- the text ---------------------------------------------------------------------------------------------------


def test_default_text_is_that_of_python(tokenizer):
    haystack = read_haystack(tokenizer)
    assert len(haystack.documents) == 1 and len(haystack.tokens) > 100_000
    assert haystack.blocks(64, 5).shape == (5, 64)


def test_blocks_come_evenly_from_documents_that_are_long_enough():
    documents = [list(range(10)), list(range(100, 103)), list(range(200, 205))]
    haystack = Haystack(documents)
    assert haystack.blocks(4, 9).tolist() == [[0, 1, 2, 3], [200, 201, 202, 203], [4, 5, 6, 7]]
    assert haystack.blocks(4, 2).tolist() == [[0, 1, 2, 3], [200, 201, 202, 203]]
    assert haystack.blocks(12, 9).tolist() == [[*range(10), 100, 101]], "across documents where none is long enough"
    with pytest.raises(ValueError, match="has 18 tokens, fewer than the length 19"):
        haystack.blocks(19, 1)


def test_long_text_is_cut(tokenizer, haystack, monkeypatch):
    whole = read_haystack(tokenizer, haystack).tokens
    monkeypatch.setattr(long_context, "MOST_HAYSTACK_TOKENS", 100)
    assert read_haystack(tokenizer, haystack).tokens == whole[:100]


def test_last_seen_by_hand():
    ids = torch.tensor([[1, 2, 3, 1, 2, 2, 2, 3, 1, 2]])
    #             pairs: 12 23 31 12 22 22 23 31 12
    assert last_seen(ids).tolist() == [[0, 0, 0, 3, 0, 1, 5, 5, 5]]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tasks": ["needel"]}, ["unknown tasks ['needel']", "needle"]),
        ({"tasks": ["needle"], "lengths": [20]}, ["length 20 is too short for the task needle"]),
        ({"tasks": ["associative_recall"], "lengths": [200]}, ["length 200", "associative_recall"]),
        ({"lengths": [10**6]}, ["haystack has", "1,000,000"]),
        ({"lengths": [1]}, ["lengths", "2 or more"]),
        ({"lengths": []}, ["lengths"]),
        ({"samples": 0}, ["samples must be 1 or more"]),
    ],
    ids=str,
)
def test_bad_options(options, words, tokenizer, haystack):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        prepare(tokenizer, **{"haystack": haystack, **options})
    assert all(word in str(caught.value) for word in words)


def test_bad_text(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        prepare(tokenizer, haystack=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        prepare(tokenizer, haystack=tmp_path / "empty.txt")


def test_tokenizer_without_numbers(haystack):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "wall": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="cannot write the number"):
        prepare(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), haystack=haystack)


# --- what models score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_a_model_that_knows_scores_1(name, tokenizer, tasks):
    model = Oracle(tokenizer, assigned if name == "variable_tracking" else said)
    assert tasks[name].run(model, batch_size=4) == {f"accuracy@{LENGTH}": 1.0} and model.batches == [4, 2]


@pytest.mark.parametrize("answer", [lambda text: said(text)[:-1].replace(".", "7"), lambda text: " not" + said(text), lambda text: ""])
def test_what_is_no_answer(answer, tokenizer, tasks):
    assert tasks["needle"].run(Oracle(tokenizer, answer)) == {f"accuracy@{LENGTH}": 0.0}


def test_some_right_is_a_share(tokenizer, tasks):
    counted = itertools.count()
    model = Oracle(tokenizer, lambda text: said(text) if next(counted) % 3 == 0 else " 0")
    assert tasks["needle"].run(model) == {f"accuracy@{LENGTH}": pytest.approx(1 / 3)}


class Copier(nn.Module):
    """Puts the token first that is `ahead` of each place in the text; wrong at the places it is told."""

    def __init__(self, vocab_size, wrong=None):
        super().__init__()
        self.vocab_size, self.wrong, self.device = vocab_size, wrong, torch.device("cpu")

    def forward(self, input_ids, use_cache):
        best = input_ids.roll(-1, 1)
        if self.wrong is not None:
            best = torch.where(self.wrong(input_ids), (best + 1) % self.vocab_size, best)
        return SimpleNamespace(logits=10.0 * nn.functional.one_hot(best, self.vocab_size))


def test_recall_counts_whole_answers(tokenizer, tasks):
    ids, marks = tasks["associative_recall"].data
    assert tasks["associative_recall"].run(Copier(len(tokenizer))) == {f"accuracy@{LENGTH}": 1.0}

    def last_digit_of_query_2(batch):
        rows = [next(i for i, row in enumerate(ids) if row.equal(text)) for text in batch]
        wrong = torch.zeros_like(batch, dtype=torch.bool)
        for i, row in enumerate(rows):
            wrong[i, (marks[row] == 2).nonzero().max()] = True
        return wrong

    assert tasks["associative_recall"].run(Copier(len(tokenizer), last_digit_of_query_2)) == {f"accuracy@{LENGTH}": 0.75}
    elsewhere = Copier(len(tokenizer), lambda batch: torch.arange(LENGTH).expand_as(batch) < LENGTH // 2)
    assert tasks["associative_recall"].run(elsewhere) == {f"accuracy@{LENGTH}": 1.0}, "only answers count"


def test_losses_by_position_and_distance(tokenizer, tasks):
    """Uniform over the vocabulary in the first 100 tokens, certain after them."""
    size = len(tokenizer)

    class Half(nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            sure = 1e4 * nn.functional.one_hot(input_ids.roll(-1, 1), size).float()
            sure[:, :127] = 0  # predictions of tokens 1 to 127
            return SimpleNamespace(logits=sure)

    found = tasks["position_perplexity"].run(Half())
    assert list(found) == [f"perplexity@{LENGTH}{part}" for part in ("", "[1-63]", "[64-127]", "[128-255]", "[256-399]")]
    assert list(found.values())[1:] == pytest.approx([size, size, 1, 1])
    assert found[f"perplexity@{LENGTH}"] == pytest.approx(size ** (127 / (LENGTH - 1)))
    found = tasks["far_bigrams"].run(Half())
    assert {f"loss@{LENGTH}[new]", f"loss@{LENGTH}[1-127 back]", f"loss@{LENGTH}[256-399 back]"} <= found.keys()
    assert found[f"loss@{LENGTH}[256-399 back]"] == pytest.approx(0, abs=1e-6), "these stand behind token 256"
    assert 0 < found[f"loss@{LENGTH}[new]"] <= math.log(size) + 1e-3


def test_groups_of_distances_are_all_tokens(tokenizer, tasks, tiny_model):
    """Means by distance, weighted by how many tokens each has, are the mean of all."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    blocks = tasks["far_bigrams"].data
    found, distances = tasks["far_bigrams"].run(model), last_seen(blocks)
    total = 0.0
    for name, value in found.items():
        bounds = re.search(r"\[(\d+)-(\d+) back\]", name)
        chosen = (distances >= int(bounds[1])) & (distances <= int(bounds[2])) if bounds else distances == 0
        total += value * chosen.sum().item()
    assert total / distances.numel() == pytest.approx(token_losses(model, blocks, 2).mean().item(), rel=1e-5)
    assert tasks["position_perplexity"].run(model)[f"perplexity@{LENGTH}"] == pytest.approx(math.exp(total / distances.numel()), rel=1e-5)


def test_every_task_at_every_level(tokenizer, tasks, tiny_model, adapter_model):
    """Any batch size gives the same; level 0 is the base's; converting changes the losses."""
    base = tiny_model("llama", vocab_size=len(tokenizer))
    plain = run_tasks(base, list(tasks.values()), progress=False)
    assert list(plain) == list(tasks)
    model = adapter_model(base)
    model.set_level(0)
    assert run_tasks(model, list(tasks.values()), progress=False) == plain
    model.set_level(3)
    converted = run_tasks(model, list(tasks.values()), progress=False)
    one_by_one = run_tasks(model, list(tasks.values()), batch_size=1, progress=False)
    for name in tasks:
        assert converted[name] == pytest.approx(one_by_one[name], rel=1e-5)
    assert converted["position_perplexity"] != plain["position_perplexity"]


def test_lengths_stand_side_by_side(tokenizer, haystack, tiny_model):
    tasks = prepare(tokenizer, ["needle", "far_bigrams"], [200, 300], 2, haystack=haystack)
    found = run_tasks(tiny_model("llama", vocab_size=len(tokenizer)), tasks, progress=False)
    assert list(found["needle"]) == ["accuracy@200", "accuracy@300"] and "loss@300[new]" in found["far_bigrams"]


def test_prompts_are_answered_through_the_cache(tokenizer, tasks, tiny_model, adapter_model, monkeypatch):
    """One forward over the prompt, then one token at a time."""
    model = adapter_model(tiny_model("llama", vocab_size=len(tokenizer)))
    model.set_level(2)
    widths = []
    hook = model.base_model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tasks["needle"].run(model, batch_size=SAMPLES)
    hook.remove()
    assert widths[0] == LENGTH and set(widths[1:]) == {1}


def test_settings_of_the_checkpoint_have_no_say(tokenizer, tasks, tiny_model):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids, generate = [], model.generate
    model.generate = lambda **kwargs: ids.append(generate(**kwargs)) or ids[-1]
    tasks["needle"].run(model)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5)
    tasks["needle"].run(model)
    half = len(ids) // 2
    assert all(a.equal(b) for a, b in zip(ids[:half], ids[half:], strict=True))


@pytest.mark.parametrize("name", ["needle", "far_bigrams"])
def test_a_batch_that_does_not_fit_is_halved(name, tokenizer, tasks, tiny_model, monkeypatch, caplog):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    expected = tasks[name].run(model)
    forward = model.forward

    def little(input_ids, *args, **kwargs):
        if len(input_ids) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids, *args, **kwargs)

    model.forward = little
    with caplog.at_level(logging.WARNING, logger="dsla_hf"):
        assert tasks[name].run(model, batch_size=5) == pytest.approx(expected, rel=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} at {LENGTH} tokens: out of memory with batches of {size}, going on with {size // 2}" for size in (5, 2)
    ]
    model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(ValueError, match=f"{name} at {LENGTH} tokens: out of memory with one sequence"):
        tasks[name].run(model)


def test_models_that_are_not_ours_too(tokenizer, tasks):
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=512, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
    found = run_tasks(GPT2LMHeadModel(config), [tasks["needle"], tasks["far_bigrams"]], progress=False)
    assert found.keys() == {"needle", "far_bigrams"}


def test_random_numbers_of_others_stay(tokenizer, haystack):
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    prepare(tokenizer, TASKS, [LENGTH], 2, haystack=haystack)
    assert random.getstate() == state and torch.random.get_rng_state().equal(torch_state)
