"""What `eval/answers.py` asks: chats, long documents with something to do behind them, formats that a rule checks, and choices by letter.

All of it is made from held-out texts and from the lists below, the same for every level, arm and run with one seed. Where the tokenizer has
a chat template it is asked in it; otherwise as text to go on with.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsla_hf.training.text import read_texts

HELD_OUT = ("novels_val.jsonl.xz", "wikitext2/valid.txt", "code_val.jsonl.xz", "peps_val.jsonl.xz")
QUESTIONS = """
What is the difference between a lake and a sea?
Why is the sky blue?
How do I boil an egg?
Write a short poem about autumn.
Explain photosynthesis to a child.
What should I pack for a weekend in the mountains?
Give me three ideas for a birthday present for my brother.
How does a bicycle stay upright?
Translate "good morning" into French.
Who wrote Romeo and Juliet?
What is the largest planet of the solar system?
Write an email to my landlord about a broken heater.
How can I sleep better at night?
What is a prime number?
Name five animals that live in Africa.
Tell me a joke about computers.
What is the capital of Japan?
Write a Python function that adds two numbers.
How many days are there in a leap year?
What are the benefits of walking every day?
Describe a quiet beach at sunrise in two sentences.
What is the past tense of "to go"?
Why do leaves change their colour?
Suggest a name for a small bakery.
What does a gardener do in winter?
How do I make a cup of tea?
Explain what a database is.
Write a sentence that begins with "Although".
What is the boiling point of water?
Who painted the Mona Lisa?
List the seasons of the year.
How do birds find their way?
What is the opposite of "generous"?
Give me a recipe for pancakes.
What is the meaning of the word "ancient"?
How can I learn to play the guitar?
Write a short story about a lost key.
What is gravity?
Which language is spoken in Brazil?
What are the primary colours?
How do I greet a new neighbour?
Explain the difference between weather and climate.
What is 15 times 4?
Write a slogan for a bicycle shop.
Why do we have leap years?
Name three inventions of the nineteenth century.
What is a metaphor? Give one example.
How can I save money on groceries?
What do bees do with nectar?
Write a thank-you note to a teacher.
How does a refrigerator keep food cold?
What is the longest river in the world?
Give two reasons for learning a foreign language.
What does "once in a blue moon" mean?
How do I reverse a list in Python?
Describe the taste of a lemon.
What is the currency of India?
Why is exercise good for the heart?
Name the parts of a flower.
Write a haiku about snow.
What is inflation?
How many continents are there, and which?
What is a good question to ask at a job interview?
Explain how a candle burns.
What was the first animal in space?
How do I remove a stain of coffee from a shirt?
What is the square root of 81?
Write one sentence about friendship.
Why do cats purr?
What is an island?
Tell me something about the moon.
What is the difference between a simile and a metaphor?
How can a shy person make friends?
Suggest three titles for a book about the sea.
What is the chemical symbol of gold?
How is bread made?
Who was Isaac Newton?
What is the fastest land animal?
Write a riddle about time.
How do I write a good summary of a text?
What is a volcano?
Give me an example of a healthy breakfast.
What does the word "reliable" mean?
Why do ships float?
How do you say "thank you" in Spanish?
What is the purpose of a constitution?
Describe your favourite season.
What is a noun?
How long does light from the sun take to reach the earth?
Give three tips for taking better photographs.
What is the difference between a fruit and a vegetable?
Write a short dialogue between a cat and a dog.
Which metal is liquid at room temperature?
Why is it important to recycle?
What is the plural of "mouse"?
How do I plan a garden?
Explain what a budget is.
What do astronauts eat?
Name a famous composer and one of his works.
What is the best way to learn new words?
""".strip().splitlines()
INSTRUCTIONS = """
Summarise the text above in two sentences.
What is the text above about?
Write a title for the text above.
What is said at the beginning of the text above?
List three things that the text above mentions.
Who or what is the text above mainly about?
Ask one question that the text above answers.
Go on with the text above.
""".strip().splitlines()
# Long texts are asked for a format in these words; short ones about a topic.
ABOUT_TEXT = "the text above"
TOPICS = ["the sea", "winter", "music", "a bicycle", "the moon", "bread", "a library", "cats"]
CONTINUED = "Question: {question}\nAnswer:"  # without a chat template
SENTENCE_CHARACTERS = (50, 160)
LETTERS = "ABCD"
PLACE = "\x02HERE\x02"  # stands for the user's words in a template


# --- rules ------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line.strip()]


def is_json_with(text: str, keys: set[str]) -> bool:
    """Whether it is an object with these keys and no others; a fence of Markdown around it is let pass."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == keys


@dataclass(frozen=True)
class Rule:
    """instruction: of {topic}. holds: whether an answer has the format."""

    instruction: str
    holds: Callable[[str], bool]


RULES = {
    "json": Rule(
        'Describe {topic} as a JSON object with the keys "name" and "colour". Write nothing but the JSON.',
        lambda text: is_json_with(text, {"name", "colour"}),
    ),
    "lines": Rule(
        "Write exactly four words about {topic}, each on a line of its own.",
        lambda text: len(lines_of(text)) == 4 and all(len(re.findall(r"[^\W\d_]+", line)) == 1 for line in lines_of(text)),
    ),
    "numbered": Rule(
        "Write a numbered list of exactly three short sentences about {topic}.",
        lambda text: (
            [found[1] for line in lines_of(text) if (found := re.match(r"\s*(\d+)[.)]\s+\S", line))] == ["1", "2", "3"]
            and len(lines_of(text)) == 3
        ),
    ),
    "word": Rule("What comes to mind first about {topic}? Answer in one word.", lambda text: len(text.split()) == 1),
    "capitals": Rule(
        "Write one sentence about {topic} in capital letters only.", lambda text: text == text.upper() and any(map(str.isalpha, text))
    ),
    "begins": Rule(
        'Write one sentence about {topic} that begins with the words "In the end".',
        lambda text: text.strip(" \"'\n").startswith("In the end"),
    ),
    "sentence": Rule(
        "Write exactly one sentence about {topic}.",
        lambda text: len(lines_of(text)) == 1 and len(re.findall(r"[.!?](?=\s|$)", text.strip())) == 1,
    ),
    "yes or no": Rule(
        'Is there something good about {topic}? Answer only "yes" or "no".', lambda text: text.strip(" .!\"'\n").lower() in ("yes", "no")
    ),
}


def letter_of(text: str) -> str | None:
    """The letter that an answer names: alone, at its beginning, or as in "The answer is B"."""
    found = re.match(r"\W*([A-D])(?![A-Za-z])", text) or re.search(
        r"\b(?:[Aa]nswer|[Ss]entence|[Oo]ption)(?: is)?:? *\(?([A-D])(?![A-Za-z])", text
    )
    return found[1] if found else None


# --- what is asked ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """input_ids: the whole prompt. kind: `short` or `long` (of chats), `format` or `choice`. length: tokens that a long prompt was made
    with, 0 of a short one. rule: name in `RULES`. letter: of the right choice. question: which of a choice's rotations belong together."""

    input_ids: list[int] = field(repr=False)
    kind: str
    length: int = 0
    rule: str | None = None
    letter: str | None = None
    question: int = 0


@dataclass(frozen=True)
class Counts:
    """Prompts of each kind; `lengths`: tokens of long ones, in turn. Formats: for each rule. Choices are asked in four rotations."""

    short: int = 100
    long: int = 100
    formats_short: int = 8
    formats_long: int = 4
    choices: int = 40
    lengths: tuple[int, ...] = (1024, 1536, 2048, 3072, 4096, 5120, 6144, 7500)

    def shorter(self, factor: float) -> Counts:
        """With lengths so many times as long."""
        return Counts(
            self.short, self.long, self.formats_short, self.formats_long, self.choices, tuple(round(x * factor) for x in self.lengths)
        )


class Template:
    """A question as tokens: in the tokenizer's chat template, or as text to go on with.

    Raises:
        ValueError: if the template does not show the user's words.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.chat = tokenizer, bool(getattr(tokenizer, "chat_template", None))
        if self.chat:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False, add_generation_prompt=True)
        else:
            shown = CONTINUED.format(question=PLACE)
        before, found, after = shown.partition(PLACE)
        if not found:
            raise ValueError("the chat template does not show what the user writes, so nothing can be asked in it")
        first = tokenizer("a", verbose=False)["input_ids"][:1]
        begun = [] if self.chat or first != [tokenizer.bos_token_id] else first
        self.before, self.after = [*begun, *self.encode(before)], after

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def short(self, question: str) -> list[int]:
        return [*self.before, *self.encode(question + self.after)]

    def long(self, document: Sequence[int], instruction: str, length: int) -> list[int]:
        """Exactly `length` tokens: the beginning of the document, and the instruction behind it."""
        room = self.room(instruction, length)
        if room < 1 or room > len(document):
            raise ValueError(f"a prompt of {length} tokens leaves {room} of them to a document of {len(document):,}: give other lengths")
        return [*self.before, *document[:room], *self._end(instruction)]

    def room(self, instruction: str, length: int) -> int:
        """Tokens of a document in a prompt of `length`."""
        return length - len(self.before) - len(self._end(instruction))

    def _end(self, instruction: str) -> list[int]:
        return self.encode(f"\n\n{instruction}{self.after}")


@dataclass(frozen=True)
class Source:
    """Held-out texts of one kind in pieces of the longest length: token ids, and which document each is of."""

    pieces: list[list[int]]
    documents: list[int]


def read_sources(tokenizer: Any, data: Path, longest: int, most: int) -> list[Source]:
    """The kinds of `HELD_OUT` that are there and long enough, up to `most` pieces of each; short documents of a kind are joined.

    Raises:
        ValueError: if none is.
    """
    sources = []
    for name in HELD_OUT:
        path = data / name
        if not path.exists():
            continue
        pieces: list[list[int]] = []
        documents: list[int] = []
        joined: list[int] = []
        for number, text in enumerate(read_texts(path)):
            ids = tokenizer(text[: 16 * longest * most], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) < longest:
                joined += ids
                ids, joined = (joined, []) if len(joined) >= longest else ([], joined)
            # Few of each document, so that there are many documents.
            for begin in range(0, min(len(ids), most * longest) - longest + 1, longest):
                pieces.append(ids[begin : begin + longest])
                documents.append(number)
        if pieces:
            places = sorted(range(len(pieces)), key=lambda place: (documents[:place].count(documents[place]), place))[:most]
            sources.append(Source([pieces[place] for place in places], [documents[place] for place in places]))
    if not sources:
        raise ValueError(f"{data} holds no text of {longest:,} tokens among {', '.join(HELD_OUT)}: give another folder")
    return sources


class _Documents:
    """Pieces of all kinds in turn, from the beginning again when all were given."""

    def __init__(self, sources: Sequence[Source], rng: random.Random):
        most = max(len(source.pieces) for source in sources)
        self.all = [(source, place) for place in range(most) for source in sources if place < len(source.pieces)]
        self.next = rng.randrange(len(self.all))

    def take(self) -> tuple[Source, int]:
        self.next += 1
        return self.all[self.next % len(self.all)]


def sentences_of(text: str) -> list[str]:
    """Sentences of one line, neither short nor long, and without what would give them away beside others."""
    found = re.split(r"(?<=[.!?])\s+", text)[1:-1]  # the ends may be cut
    low, high = SENTENCE_CHARACTERS
    return [one for one in found if low <= len(one) <= high and "\n" not in one and one[0].isupper() and "<unk>" not in one]


def make_asked(tokenizer: Any, data: Path, counts: Counts, seed: int) -> list[Asked]:
    """All prompts, deterministic by `seed`.

    Raises:
        ValueError: if the texts are too short for the lengths, or hold too few sentences to choose from.
    """
    rng, template = random.Random(seed), Template(tokenizer)
    lengths, longest = counts.lengths, max(counts.lengths)
    needed = max(16, math.ceil((counts.long + counts.choices) / 2))
    documents = _Documents(read_sources(tokenizer, data, longest, needed), rng)
    asked = [Asked(template.short(QUESTIONS[i % len(QUESTIONS)]), "short") for i in range(counts.short)]

    def long(number: int, instruction: str, kind: str, **more: Any) -> Asked:
        source, place = documents.take()
        length = lengths[number % len(lengths)]
        return Asked(template.long(source.pieces[place], instruction, length), kind, length, **more)

    asked += [long(i, rng.choice(INSTRUCTIONS), "long") for i in range(counts.long)]
    for name, rule in RULES.items():
        for i in range(counts.formats_short):
            question = rule.instruction.format(topic=TOPICS[i % len(TOPICS)])
            asked.append(Asked(template.short(question), "format", rule=name))
        asked += [long(i, rule.instruction.format(topic=ABOUT_TEXT), "format", rule=name) for i in range(counts.formats_long)]
    for number in range(counts.choices):
        asked += _choice(template, documents, lengths[number % len(lengths)], number, rng)
    return asked


def _choice(template: Template, documents: _Documents, length: int, number: int, rng: random.Random) -> list[Asked]:
    """Four rotations of one question: which of four sentences stands in the text."""
    for _ in range(len(documents.all)):
        source, place = documents.take()
        piece = source.pieces[place]
        own = sentences_of(template.decode(piece[: length // 2]))  # far from the question
        wrong = _of_others(template, source, place, rng)
        if own and len(wrong) == len(LETTERS) - 1:
            right = rng.choice(own)
            return [_rotation(template, piece, length, right, wrong, turn, number) for turn in range(len(LETTERS))]
    raise ValueError("the held-out texts hold too few sentences to choose from: give more text")


def _of_others(template: Template, source: Source, place: int, rng: random.Random) -> list[str]:
    """Sentences of other documents, where a kind has several, that a piece does not hold; as many as there are wrong options, if need be
    more than one of a piece."""
    elsewhere = [x for x in range(len(source.pieces)) if x != place]
    others = [x for x in elsewhere if source.documents[x] != source.documents[place]] or elsewhere
    text, found = template.decode(source.pieces[place]), dict[str, None]()
    for x in rng.sample(others, len(others)) * 3:
        sentences = [one for one in sentences_of(template.decode(source.pieces[x])) if one not in text and one not in found]
        if sentences:
            found[rng.choice(sentences)] = None
        if len(found) == len(LETTERS) - 1:
            break
    return list(found)


def _rotation(template: Template, piece: Sequence[int], length: int, right: str, wrong: list[str], turn: int, number: int) -> Asked:
    options = [*wrong[:turn], right, *wrong[turn:]]
    shown = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    instruction = f"Which of these four sentences stands in the text above?\n{shown}\nAnswer with one letter: A, B, C or D."
    if template.room(instruction, length) < length // 2:
        raise ValueError(f"choices have no room in prompts of {length} tokens: give longer ones, or leave choices out")
    return Asked(template.long(piece, instruction, length), "choice", length, letter=LETTERS[turn], question=number)
