"""An invented world, so that a demo can teach a model facts that no other model knows.

From one seed it makes question and answer rows: the facts of the world, and a new task, the newcomers: people who move
in after the base model was made. It also makes a tokenizer. The model that learns the facts is in `tiny_base.py`.

Newcomers are asked about in the wordings that the base model knows from the old inhabitants, and the answers are the
old towns and trades. So the new task writes into the very memory that holds the old facts: tuned plainly on it, the
model starts to send the old inhabitants to the wrong towns. The test rows ask about the same newcomers in a wording
that the training rows never use for that person and question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PEOPLE, NEWCOMERS, TOWNS, RIVERS = 96, 32, 12, 6
CONTEXT = 256  # tokens; the longest row has about thirty

ONSETS = [*"bdfghklmnprstvwz", "br", "dr", "gr", "kl", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ei", "ou"]
CODAS = ["l", "n", "r", "s", "k", "m", "th"]
TRADES = ["baker", "smith", "weaver", "miller", "cook", "bard", "dyer", "potter", "fisher", "mason", "piper", "doctor"]
GOODS = ["salt", "wool", "honey", "amber", "cheese", "glass", "tin", "paper", "silk", "apples", "rope", "copper"]

PERSON_QUESTIONS = {
    "home": ("Where does {} live?", "In which town is the home of {}?", "Which town does {} call home?"),
    "trade": ("What is the trade of {}?", "What is {} by trade?", "As what does {} work?"),
}
TOWN_QUESTIONS = {
    "river": ("Which river flows through {}?", "On which river does {} lie?", "By what river was {} built?"),
    "goods": ("What does {} sell?", "For which goods is {} known?", "What do traders buy in {}?"),
}


@dataclass(frozen=True)
class Row:
    """A line of JSONL. The answer starts with the space that parts it from the prompt."""

    prompt: str
    answer: str


class World(NamedTuple):
    """facts: what the base model is taught, each fact in three wordings.
    task_train, task_test: the newcomers' facts, two wordings of each and the third one."""

    facts: list[Row]
    task_train: list[Row]
    task_test: list[Row]


def make_world(seed: int) -> World:
    """The same world for the same seed."""
    rng = random.Random(seed)
    names = _Names(rng)
    towns = [names.new(2) for _ in range(TOWNS)]
    rivers = [names.new(1) for _ in range(RIVERS)]
    people = [f"{names.new(2)} {names.new(2)}" for _ in range(PEOPLE + NEWCOMERS)]
    inhabitants, newcomers = people[:PEOPLE], people[PEOPLE:]

    facts = []
    for subjects, questions, relation, answers in (
        (inhabitants, PERSON_QUESTIONS, "home", towns),
        (inhabitants, PERSON_QUESTIONS, "trade", TRADES),
        (towns, TOWN_QUESTIONS, "river", rivers),
        (towns, TOWN_QUESTIONS, "goods", GOODS),
    ):
        for subject, answer in zip(subjects, _evenly(answers, len(subjects), rng), strict=True):
            facts += _rows(questions[relation], subject, answer)

    task_train, task_test = [], []
    for relation, answers in (("home", towns), ("trade", TRADES)):
        for subject, answer in zip(newcomers, _evenly(answers, len(newcomers), rng), strict=True):
            rows = _rows(PERSON_QUESTIONS[relation], subject, answer)
            task_test.append(rows.pop(rng.randrange(len(rows))))
            task_train += rows
    return World(facts, task_train, task_test)


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
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=CONTEXT
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

    def new(self, syllables: int) -> str:
        while True:
            parts = [self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(syllables)]
            word = "".join([*parts, self.rng.choice(CODAS)]).capitalize()
            if word not in self.taken:
                self.taken.add(word)
                return word


def _rows(questions: Sequence[str], subject: str, answer: str) -> list[Row]:
    return [Row(question.format(subject), f" {answer}") for question in questions]


def _evenly(values: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` values in random order, each about as often as the others, so that guessing one of them gains nothing."""
    repeated = [values[index % len(values)] for index in range(count)]
    rng.shuffle(repeated)
    return repeated
