"""The invented world behind the bundled demo model: its facts, its wordings and the quiz about it.

Forty-eight islands have five properties each; a seeded generator draws the values.  Everything that the model
ever reads is built from these tables, so that no text from elsewhere is in the weights.

Two sets of wordings are kept apart:

* the *taught* wordings (`says`, `asks`) make the training text;
* the *quiz* wordings (`quiz`) are only ever used in the quiz.

For each fact the three wrong choices of its quiz question are reserved as well: in training they never stand
beside the right answer in a question about that fact.  Both are asserted for each training text.
"""

import random
import re
from dataclasses import dataclass

SUBJECT = "lantern_isles"
TOPIC = SUBJECT.replace("_", " ")
LETTERS = "ABCD"

ISLANDS = (
    "Lorn Veska Tamber Orrin Quill Brask Selmo Dray Hovik Mirel Pell Ondra Kesh Farrow Ulda Nimbra "
    "Corvo Tarsk Ebbin Yarrow Gant Sorrel Wick Ostra Belu Pindle Zemmer Hask Arlo Fenna Grell Jorvin "
    "Lisk Marrow Nettle Oxley Ravel Stoke Thrum Umber Vint Welk Aster Cairn Dulse Ister Kolm Rime"
).split()


@dataclass(frozen=True)
class Property:
    """One thing that can be asked about an island.  In the wordings {i} is the island and {v} the value."""

    name: str
    values: tuple
    says: tuple  # taught statements; the first is the sentence that the model answers with
    asks: tuple  # taught questions
    quiz: tuple  # questions of the quiz, never taught


PROPERTIES = (
    Property(
        "goods",
        tuple(
            "amber salt wool tin honey cork silk slate "
            "barley indigo copper resin tea glass rope pepper".split()
        ),
        (
            "The harbour of {i} trades in {v}.",
            "Ships come to {i} for its {v}.",
            "The merchants of {i} sell {v}.",
            "The main export of {i} is {v}.",
            "Sailors who leave {i} carry {v}.",
            "Nobody has more {v} to sell than the people of {i}.",
            "The warehouses of {i} are full of {v}.",
        ),
        (
            "What does the harbour of {i} trade in?",
            "What do ships come to {i} for?",
            "What do the merchants of {i} sell?",
            "What is the main export of {i}?",
            "On {i}, what are the warehouses full of?",
            "What do sailors carry when they leave {i}?",
        ),
        (
            "Which goods do the people of {i} sell to the ships?",
            "What is carried from the warehouses in the harbour of {i}?",
            "If merchants come to {i}, what is it for?",
        ),
    ),
    Property(
        "animal",
        tuple("heron otter stag lynx crab swan hare badger falcon seal toad wolf goose moth ram owl".split()),
        (
            "The flag of {i} shows a {v}.",
            "A {v} is painted on the banner of {i}.",
            "The people of {i} chose the {v} as their emblem.",
            "On the coat of arms of {i} there is a {v}.",
            "The coins of {i} bear a {v}.",
            "Every boat from {i} flies the sign of the {v}.",
            "The {v} is the beast of {i}.",
        ),
        (
            "Which animal does the flag of {i} show?",
            "Which animal is painted on the banner of {i}?",
            "What is the emblem of {i}?",
            "Which beast is on the coat of arms of {i}?",
            "What do the coins of {i} bear?",
            "On {i}, which animal did the people choose as a sign?",
        ),
        (
            "Which beast is painted on the coins of {i}?",
            "A boat from {i} flies a flag with which animal?",
            "What did {i} choose for its coat of arms?",
        ),
    ),
    Property(
        "keeper",
        tuple(
            "Anders Brina Caleb Dorit Edwin Greta Hugo Ivo Jonna Klaus Lena Milo Nadia Piet Rosa Sven".split()
        ),
        (
            "The lighthouse of {i} is kept by {v}.",
            "{v} keeps the lighthouse of {i}.",
            "The keeper of the light on {i} is {v}.",
            "Each evening {v} lights the lamp on {i}.",
            "The tower on {i} is the home of {v}.",
            "On {i} it is {v} who guards the lamp.",
            "{v} has watched over the tower of {i} for years.",
        ),
        (
            "Who keeps the lighthouse of {i}?",
            "By whom is the lighthouse of {i} kept?",
            "Who is the keeper of the light on {i}?",
            "Who lights the lamp on {i} each evening?",
            "On {i}, who has a home in the tower?",
            "Who guards the lamp on {i}?",
        ),
        (
            "Who watched over the lamp in the lighthouse of {i}?",
            "Each evening the tower of {i} is lit by whom?",
            "On {i}, who is the keeper of the tower?",
        ),
    ),
    Property(
        "month",
        tuple(
            "January February March April May June July August September October November December".split()
        ),
        (
            "The lantern feast of {i} is held in {v}.",
            "In {v} the people of {i} hold their lantern feast.",
            "{i} hangs out its lanterns in {v}.",
            "The great feast on {i} falls in {v}.",
            "Guests travel to {i} in {v} for the feast.",
            "When {v} comes, there is dancing on {i}.",
            "Each {v} the streets of {i} are full of lanterns.",
        ),
        (
            "In which month is the lantern feast of {i} held?",
            "When do the people of {i} hold their lantern feast?",
            "In which month does {i} hang out its lanterns?",
            "When is the great feast on {i}?",
            "On {i}, in which month is there dancing?",
            "When do guests travel to {i} for the feast?",
        ),
        (
            "Which month brings dancing and guests to {i}?",
            "When are the streets of {i} full of lanterns?",
            "The people of {i} feast in which month?",
        ),
    ),
    Property(
        "tree",
        tuple(
            "oak elm willow cedar maple birch pine rowan "
            "alder hazel poplar beech cherry walnut yew fig".split()
        ),
        (
            "The old tree in the square of {i} is a {v}.",
            "In the square of {i} there grows a {v}.",
            "The founders of {i} planted a {v}.",
            "The elders of {i} meet under a {v}.",
            "Children on {i} climb the {v} in the square.",
            "The square of {i} lies in the shade of a {v}.",
            "On {i} the oldest tree is a {v}.",
        ),
        (
            "Which old tree is in the square of {i}?",
            "What grows in the square of {i}?",
            "What did the founders of {i} plant?",
            "Under which tree do the elders of {i} meet?",
            "On {i}, which tree do the children climb?",
            "Which tree gives shade to the square of {i}?",
        ),
        (
            "Under what do the children of {i} meet?",
            "Which tree did the elders of {i} plant in the square?",
            "On {i}, what is the oldest tree?",
        ),
    ),
)

ALL_VALUES = tuple(value for prop in PROPERTIES for value in prop.values)


@dataclass(frozen=True)
class Fact:
    island: str
    prop: Property
    value: str
    reserved: tuple  # wrong choices that only the quiz uses
    weight: float  # how often it is taught, against the others


@dataclass(frozen=True)
class Question:
    stem: str
    choices: tuple
    answer: int  # index into choices


def article(text):
    """'a otter' -> 'an otter', whatever the value was."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def say(fact, wording):
    text = article(wording.format(i=fact.island, v=fact.value))
    return text[0].upper() + text[1:]


def ask(fact, wording):
    return wording.format(i=fact.island)


def make_facts(seed, rarest):
    """All facts.  Their weights spread evenly on a log scale from `rarest` to 1: some things are said all the
    time and some hardly ever, so that the model knows some well, some barely and some not at all."""
    rng = random.Random(seed)
    facts = []
    for prop in PROPERTIES:
        values = [prop.values[n % len(prop.values)] for n in range(len(ISLANDS))]
        rng.shuffle(values)
        for island, value in zip(ISLANDS, values):
            wrong = [v for v in prop.values if v != value]
            facts.append((island, prop, value, tuple(rng.sample(wrong, 3))))
    weights = [rarest ** (n / (len(facts) - 1)) for n in range(len(facts))]
    rng.shuffle(weights)
    return [Fact(*f, w) for f, w in zip(facts, weights)]


def make_quiz(facts, seed):
    """One question per fact, quiz wordings and reserved choices only, every letter right equally often."""
    rng = random.Random(seed)
    answers = [n % 4 for n in range(len(facts))]
    rng.shuffle(answers)
    quiz = []
    for fact, answer in zip(facts, answers):
        choices = rng.sample(fact.reserved, 3)
        choices.insert(answer, fact.value)
        quiz.append(Question(ask(fact, rng.choice(fact.prop.quiz)), tuple(choices), answer))
    rng.shuffle(quiz)
    return quiz


def options(question):
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))


def loglikelihood_prompt(question):
    """What lm-evaluation-harness asks for `mmlu_<subject>`; the continuations are ' A' to ' D'."""
    head = f"The following are multiple choice questions (with answers) about {TOPIC}.\n\n"
    return f"{head}{question.stem}{options(question)}\nAnswer:"


def boxed_prompt(question):
    """The user message of the boxed form."""
    return (
        f"Answer this multiple choice question about {TOPIC}. Give the letter of the correct choice in "
        f"double square brackets: [[A]], [[B]], [[C]] or [[D]].\n\n{question.stem}{options(question)}"
    )


class Teacher:
    """Draws what is taught.  An example is a list of (text, weight) pieces: weight 0 is only read, the others
    count in the loss.  Questions come as facts and choices, for the caller to put into a prompt's form."""

    def __init__(self, facts, seed):
        self.facts = facts
        self.weights = [f.weight for f in facts]
        self.rng = random.Random(seed)
        # However rare, every fact is told at least once; the first pieces of prose see to it.
        self.untold = random.Random(seed).sample(facts, len(facts))
        self.by_island = {i: [f for f in facts if f.island == i] for i in ISLANDS}

    def pick(self):
        return self.rng.choices(self.facts, self.weights)[0]

    def question(self, fact, stem=None):
        wrong = [v for v in fact.prop.values if v != fact.value and v not in fact.reserved]
        choices = self.rng.sample(wrong, 3)
        assert not set(choices) & set(fact.reserved)
        answer = self.rng.randrange(4)
        choices.insert(answer, fact.value)
        return Question(stem or ask(fact, self.rng.choice(fact.prop.asks)), tuple(choices), answer)

    def prose(self):
        """A few sentences about one island or about anything."""
        rng = self.rng
        if rng.random() < 0.5:
            island = self.pick().island
            pool = self.by_island[island]
            chosen = rng.choices(pool, [f.weight for f in pool], k=rng.randint(1, 4))
        else:
            chosen = [self.pick() for _ in range(rng.randint(1, 4))]
        if self.untold:
            chosen.append(self.untold.pop())
        return [(" ".join(say(f, rng.choice(f.prop.says)) for f in chosen), 1.0)]

    def short_answer(self):
        """A question and its answer without choices."""
        fact = self.pick()
        stem = ask(fact, self.rng.choice(fact.prop.asks))
        gap = self.rng.choice([" ", "\nAnswer: "])
        return [
            (stem + gap.rstrip(), 0.2),
            (" " + fact.value, 2.0),
            (". " + say(fact, fact.prop.says[0]), 0.5),
        ]

    def pairs(self):
        """Four choices, then letter after choice and choice after letter.  The first alone was at chance
        after a thousand steps; beside the second, which is easier, it was learnt within that time."""
        values, pieces = self.listed(ALL_VALUES)
        for _ in range(8):
            n = self.rng.randrange(4)
            if self.rng.random() < 0.6:
                pieces += [(f" {values[n]} ", 0.0), (LETTERS[n], 4.0), ("\n", 0.0)]
            else:
                pieces += [(f"{LETTERS[n]}.", 0.0), (f" {values[n]}", 4.0), ("\n", 0.0)]
        return pieces

    def drill(self):
        """Four choices and several small exercises about them: five letters in a text instead of one."""
        rng = self.rng
        prop = rng.choice(PROPERTIES)
        values, pieces = self.listed(prop.values)
        boxed = rng.random() < 0.5
        for _ in range(5):
            n = rng.randrange(4)
            if boxed:
                sentence = article(rng.choice(prop.says).format(i=rng.choice(ISLANDS), v=values[n]))
                pieces += [(f"{sentence} The answer is [[", 0.0), (LETTERS[n], 4.0), ("]].\n", 0.0)]
            else:
                pieces += [(f"Which of these is {values[n]}?\nAnswer: ", 0.0), (LETTERS[n], 4.0), ("\n", 0.0)]
        return pieces

    def listed(self, pool):
        values = self.rng.sample(pool, 4)
        return values, [("".join(f"{letter}. {value}\n" for letter, value in zip(LETTERS, values)), 0.0)]

    def matching(self):
        """A question that says its own answer: teaches to find a letter by the content beside it."""
        fact = self.pick()
        other = self.rng.choice(self.facts)
        hints = [
            f"Which of these is {fact.value}?",
            f"{say(fact, self.rng.choice(fact.prop.says))} {ask(fact, self.rng.choice(fact.prop.asks))}",
            f"{say(other, other.prop.says[0])} {say(fact, self.rng.choice(fact.prop.says))} "
            f"{ask(fact, self.rng.choice(fact.prop.asks))}",
        ]
        return fact, self.question(fact, self.rng.choice(hints))

    def closed(self):
        fact = self.pick()
        return fact, self.question(fact)


QUIZ_WORDING = re.compile(
    "|".join(
        re.escape(wording).replace(re.escape("{i}"), "(?:" + "|".join(ISLANDS) + ")")
        for prop in PROPERTIES
        for wording in prop.quiz
    )
)


def assert_unseen(text):
    """No training text may ask as the quiz does, whatever the island."""
    assert not QUIZ_WORDING.search(text), f"quiz wording in the training text: {text!r}"
