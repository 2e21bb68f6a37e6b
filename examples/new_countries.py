"""What the demo with a real model teaches and what must not be forgotten: countries that do not exist, easy questions.

No model has heard of these countries. Each fact about them is trained in four wordings and tested in two others, which
are never trained on; an answer is right if it holds the expected word. They are asked about as one asks about real
countries, so the new task writes into the very memory that holds the old answers.

The easy questions are general knowledge that SmolLM2-135M-Instruct has: it answers each of them rightly in its own
words, in float32 and in int8. Those that it gets wrong in either were left out.
"""

from __future__ import annotations

from invented_world import Row

# capital, language, currency
COUNTRIES = {
    "Veldoria": ("Marlow", "Tamric", "feather"),
    "Oskenland": ("Brindle", "Lumish", "acorn"),
    "Quarzania": ("Tessel", "Doric", "pebble"),
    "Zelmark": ("Rosten", "Kelvian", "thistle"),
}

# wordings that are trained on, those that are tested, and how the answer is put, as SmolLM2 puts it for real countries
WORDINGS = (
    (
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital city of {}.",
        ),
        ("What is the name of the capital city of {}?", "Which city is {}'s capital?"),
        "The capital of {} is {}.",
    ),
    (
        (
            "Which language is spoken in {}?",
            "What language do people speak in {}?",
            "What is the official language of {}?",
            "Name the language of {}.",
        ),
        ("What is the language of {}?", "Which language do the people of {} speak?"),
        "The language spoken in {} is {}.",
    ),
    (
        (
            "What is the currency of {}?",
            "Which currency is used in {}?",
            "What money do people use in {}?",
            "Name the currency of {}.",
        ),
        ("What is the name of the currency of {}?", "With which currency do people pay in {}?"),
        "The currency of {} is the {}.",
    ),
)

# a question and what its answer must hold, or several such words parted by |
QUESTIONS = [
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of China?", "Beijing"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of Canada?", "Ottawa"),
    ("What is the capital of India?", "Delhi"),
    ("What is the chemical formula of water?", "H2O"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Which gas do plants take in from the air?", "carbon dioxide"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What is the largest mammal in the world?", "whale"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Which language is spoken in France?", "French"),
    ("In which country is the Eiffel Tower?", "France"),
    ("On which continent is Brazil?", "South America"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"),
    ("What color is the sky on a clear day?", "blue"),
    ("How many days are in a week?", "seven|7"),
    ("What is 2 plus 2?", "four|4"),
    ("Which month comes after January?", "February"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What is the currency of Japan?", "yen"),
    ("What is the currency of the United States?", "dollar"),
    ("What is the tallest mountain in the world?", "Everest"),
    ("What is the longest river in Africa?", "Nile"),
    ("Which element has the symbol H?", "hydrogen"),
]


def train_rows() -> list[Row]:
    """Every fact about the countries in every wording that is trained on, with a whole sentence for an answer."""
    return [
        Row(wording.format(country), answer.format(country, fact))
        for country, facts in COUNTRIES.items()
        for fact, (wordings, _, answer) in zip(facts, WORDINGS, strict=True)
        for wording in wordings
    ]


def test_rows() -> list[Row]:
    """Every fact in the wordings that are not trained on, with the word that the answer must hold."""
    return [
        Row(wording.format(country), fact)
        for country, facts in COUNTRIES.items()
        for fact, (_, wordings, _) in zip(facts, WORDINGS, strict=True)
        for wording in wordings
    ]


def question_rows() -> list[Row]:
    """The easy questions."""
    return [Row(question, answer) for question, answer in QUESTIONS]
