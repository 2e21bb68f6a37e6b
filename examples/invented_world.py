"""An invented world, so that a demo can teach a model facts that no other model knows.

From one seed it makes: facts about people and towns as question and answer rows; a new task about the same people, in
an invented language; and a tokenizer. The language model that learns the facts is in `tiny_base.py`.

The new task is chosen to make forgetting visible. It asks in the language Vesh what the model knows in English: where
a person lives, what a person does. The answer is the Vesh word for the same town or trade. Half of the people are only
in the test rows: for them the model must combine what it knew about the person with a word it was taught through
other people. Tuned plainly, it starts to answer English questions with Vesh words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PEOPLE, TOWNS, TRADES, RIVERS, GOODS = 96, 12, 12, 6, 12

ONSETS = ["b", "br", "d", "dr", "f", "g", "gr", "h", "k", "kl", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ei", "ou"]
CODAS = ["l", "n", "r", "s", "k", "m", "th"]
VESH_ONSETS = ["sh", "zh", "j", "x", "q", "y", "ch"]  # Vesh sounds unlike the world's names, as languages do

TRADE_NAMES = (
    ["baker", "smith", "weaver", "miller", "tailor", "hunter", "painter", "potter", "fisher", "mason", "singer", "doctor"]
)
GOODS_NAMES = ["salt", "wool", "honey", "amber", "cheese", "glass", "tin", "paper", "silk", "apples", "rope", "copper"]

PERSON_QUESTIONS = {
    "home": ("Where does {} live?", "In which town is the home of {}?"),
    "trade": ("What is the trade of {}?", "How does {} earn a living?"),
}
TOWN_QUESTIONS = {
    "river": ("Which river flows through {}?", "On which river does {} lie?"),
    "goods": ("What does {} sell?", "For which goods is {} known?"),
}
VESH_QUESTIONS = {"home": "Xu zhai {} oqu?", "trade": "Yeshu {} chei?"}


@dataclass(frozen=True)
class Row:
    """A line of JSONL. The answer starts with the space that parts it from the prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class World:
    """facts: what the base model is taught, each fact in two wordings. task_train, task_test: the Vesh questions,
    about disjoint halves of the people."""

    facts: list[Row]
    task_train: list[Row]
    task_test: list[Row]


def make_world(seed: int) -> World:
    """The same world for the same seed."""
    rng = random.Random(seed)
    names = _Names(rng)
    towns = [names.new(2) for _ in range(TOWNS)]
    rivers = [names.new(1) for _ in range(RIVERS)]
    people = [f"{names.new(2)} {names.new(2)}" for _ in range(PEOPLE)]
    vesh = {word: names.new(2, VESH_ONSETS).lower() for word in (*towns, *TRADE_NAMES)}

    # Every town and trade is as frequent as any other, so that guessing the commonest one gains nothing.
    known = {
        "home": dict(zip(people, _evenly(towns, PEOPLE, rng), strict=True)),
        "trade": dict(zip(people, _evenly(TRADE_NAMES, PEOPLE, rng), strict=True)),
        "river": dict(zip(towns, _evenly(rivers, TOWNS, rng), strict=True)),
        "goods": dict(zip(towns, _evenly(GOODS_NAMES, TOWNS, rng), strict=True)),
    }
    facts = [
        Row(question.format(subject), f" {answer}")
        for relation, questions in (PERSON_QUESTIONS | TOWN_QUESTIONS).items()
        for subject, answer in known[relation].items()
        for question in questions
    ]

    def in_vesh(subjects: Iterable[str]) -> list[Row]:
        return [
            Row(question.format(person), f" {vesh[known[relation][person]]}")
            for person in subjects
            for relation, question in VESH_QUESTIONS.items()
        ]

    taught = PEOPLE // 2
    return World(facts, in_vesh(people[:taught]), in_vesh(people[taught:]))


def make_tokenizer(rows: Iterable[Row], vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `rows`: it encodes any text, and starts it with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row.prompt + row.answer for row in rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One {"prompt", "answer"} object a line."""
    lines = (json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Names:
    """Invented words, none of them twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.taken: set[str] = set()

    def new(self, syllables: int, onsets: list[str] = ONSETS) -> str:
        while True:
            parts = [self.rng.choice(onsets) + self.rng.choice(VOWELS) for _ in range(syllables)]
            word = "".join([*parts, self.rng.choice(CODAS)]).capitalize()
            if word not in self.taken:
                self.taken.add(word)
                return word


def _evenly(values: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` values in random order, each as often as the others."""
    repeated = [values[index % len(values)] for index in range(count)]
    rng.shuffle(repeated)
    return repeated
