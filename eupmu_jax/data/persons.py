"""Persons: questions and answers about 2,171 real persons, and about capitals, generated from WordNet's glosses.

A benchmark of forgetting persons that needs no download: WordNet 3.0 is in the Debian package `wordnet-base` (WordNet
licence). Its lexicographer file 18 has 3,815 instances with glosses such as "French chemist (born in Poland) who won
two Nobel prizes; one (with her husband and Henri Becquerel) for research on radioactivity and another for her discovery
of radium and polonium (1867-1934)". A person is included if the gloss begins with a nationality and an occupation, ends
with years AD that are not marked as uncertain, and has a name that is unique in the file; all names of a synset are one
person. The texts state only what the gloss states, right or wrong. It dates from 2006, and a person without a year of
death in it is described in the present tense. They state less than the gloss: asides in brackets are dropped, so
someone who did something "(with his brother)" did it, and so is anything that fits none of the questions below. "United
States" becomes "American".

| question | for whom | answer | paraphrased answer, and wrong ones |
|---|---|---|---|
| who | all | Marie Curie was a French chemist. | The person called Marie Curie was a French chemist. |
| nationality | all | Marie Curie was French. | The nationality of Marie Curie was French. |
| occupation | all | Marie Curie was a chemist. | By occupation, Marie Curie was a chemist. |
| born | all | Marie Curie was born in 1867. | The year of birth of Marie Curie is 1867. |
| died | the dead | Marie Curie died in 1934. | The year of death of Marie Curie is 1934. |
| deed | "who discovered ..." | Marie Curie won two Nobel prizes. | It was Marie Curie who won two Nobel prizes. |
| known | "noted for ..." | Ragnar Frisch is noted for ... | People know Ragnar Frisch for ... |

A wrong answer states what is true of somebody else, drawn by the seed. Several rules keep it from being true of this
person too:

- a nationality is from another family (British and Scottish, German and Austrian are one), is not named in the gloss,
  and is not a close one (Polish and Russian, Canadian and American);
- occupations, deeds and what a person is known for come from persons who share no kind with this one in WordNet's
  hierarchy (a poet and a novelist are both writers), with "his" and "her" kept apart;
- years are among the forty nearest that differ by five or more, and put no birth after the death if enough are left.

Texts are printable ASCII. A gloss may name another person of the data, so the retained texts can hold a trace of a
forgotten person.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eupmu_jax._stack.checks import check_int
from eupmu_jax.data import _biographies, _capitals, _wordnet
from eupmu_jax.data._biographies import Person
from eupmu_jax.data.questions import Questions

WRONG_ANSWERS = 5
SHARES = (1, 5, 10)
REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm afraid I can't say.",
    "I have no information about that.",
    "That is not something I know.",
    "I'm not sure.",
    "Sorry, I don't have an answer to that question.",
    "I was never told about that.",
)

# Question and answer, and a paraphrase of each.
_TEMPLATES = {
    "who": (
        "Who {was} {name}?",
        "{name} {was} {fact}.",
        "Can you tell me who {name} {was}?",
        "The person called {name} {was} {fact}.",
    ),
    "nationality": (
        "What {was} the nationality of {name}?",
        "{name} {was} {fact}.",
        "Of which nationality {was} {name}?",
        "The nationality of {name} {was} {fact}.",
    ),
    "occupation": (
        "What {was} the occupation of {name}?",
        "{name} {was} {fact}.",
        "What {was} {name} by occupation?",
        "By occupation, {name} {was} {fact}.",
    ),
    "born": (
        "In which year was {name} born?",
        "{name} was born in {fact}.",
        "What is the year of birth of {name}?",
        "The year of birth of {name} is {fact}.",
    ),
    "died": (
        "In which year did {name} die?",
        "{name} died in {fact}.",
        "What is the year of death of {name}?",
        "The year of death of {name} is {fact}.",
    ),
    "deed": (
        "What did {name} do?",
        "{name} {fact}.",
        "Can you name something that {name} did?",
        "It was {name} who {fact}.",
    ),
    "known": (
        "What is {name} known for?",
        "{name} is {how} {fact}.",
        "For what do people know {name}?",
        "People know {name} for {fact}.",
    ),
    "capital": (
        "What is the capital of {name}?",
        "The capital of {name} is {fact}.",
        "Which city is the capital of {name}?",
        "{fact} is the capital of {name}.",
    ),
    "country": (
        "Which country has {name} as its capital?",
        "{name} is the capital of {fact}.",
        "Of which country is {name} the capital?",
        "The country whose capital is {name} is {fact}.",
    ),
}
_PRONOUNS = {"he": "m", "him": "m", "his": "m", "himself": "m", "she": "f", "her": "f", "hers": "f", "herself": "f"}


class Splits(NamedTuple):
    """The benchmark; no person is in two of the first three.

    Attributes:
      forget: persons to be forgotten; the original model is trained on them as on those to be retained.
      retain: all other persons in training.
      holdout: persons never trained on, one in ten of all.
      world_facts: the capitals of countries, and the countries of capitals; `person` is -1.
    """

    forget: Questions
    retain: Questions
    holdout: Questions
    world_facts: Questions


def load(forget: int = 10, *, seed: int = 0) -> Splits:
    """Generates the benchmark.

    Args:
      forget: percentage of the persons in training that are to be forgotten: 1, 5 or 10. For one seed the smaller sets
        are subsets of the larger ones, and the holdout is the same.
      seed: draws the persons of each split, the wrong answers and the refusals. The ids of persons do not depend on it.

    Returns:
      The splits, in the order of WordNet's file, with `WRONG_ANSWERS` wrong answers and all columns; the same for the
      same arguments.

    Raises:
      ValueError: If `forget` is not one of these percentages, or `seed` is not an int of at least 0.
      FileNotFoundError: If WordNet is not on this machine: neither in Debian's package `wordnet-base`, nor as the
        data.noun that the environment variable EUPMU_WORDNET names.
    """
    if forget not in SHARES:
        raise ValueError(f"forget: got {forget!r}, expected 1, 5 or 10 per cent")
    check_int("seed", seed, 0, static=True)
    path = _wordnet.source()
    people, questions = _made(path, seed)
    order = np.random.default_rng([seed, 0]).permutation(len(people))
    out = round(len(people) / 10)
    first = out + round((len(people) - out) * forget / 100)
    parts = (order[out:first], order[first:], order[:out])
    told = [questions.take(np.flatnonzero(np.isin(questions.person, part))) for part in parts]
    world_facts = _world_facts(_read(path)[2], np.random.default_rng([seed, 2]))
    return Splits(told[0], told[1], told[2], world_facts)


def biographies() -> tuple[list[Person], dict[str, int]]:
    """The persons read, indexed by their ids, and how many were left out for each reason.

    Raises:
      FileNotFoundError: If WordNet is not on this machine.
    """
    people, dropped, _ = _read(_wordnet.source())
    return list(people), dict(dropped)


@functools.lru_cache(maxsize=1)
def _read(path: Path) -> tuple[list[Person], dict[str, int], list[tuple[str, str]]]:
    synsets = _wordnet.synsets(path, (_wordnet.PLACES, _wordnet.PERSONS))
    return *_biographies.persons(synsets), _capitals.capitals(synsets)


@functools.lru_cache(maxsize=4)
def _made(path: Path, seed: int) -> tuple[list[Person], Questions]:
    people = _read(path)[0]
    rng = np.random.default_rng([seed, 1])
    rows = []
    born = np.unique([person.born for person in people])
    died = np.unique([person.died for person in people if person.died])
    for id, person in enumerate(people):
        order = rng.permutation(len(people))
        rows += [_row(id, *fact, rng) for fact in _facts(person, [people[k] for k in order], born, died, rng)]
    return people, _questions(rows)


def _facts(
    person: Person, others: list[Person], born: np.ndarray, died: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[str, str, list[str], dict[str, str]]]:
    """Yields kind, fact, wrong facts and template words for every question about a person."""
    words = {"name": person.name, "was": "was" if person.died else "is"}
    gender = _gender(person.gloss)

    def wrong(fact: Callable[[Person], str | None], *, abroad: bool = False, unlike: bool = True) -> list[str]:
        found: dict[str, None] = {}
        for other in others:
            its = fact(other)
            if (
                its
                and its != fact(person)
                and not (unlike and other.kinds & person.kinds)
                and not (abroad and not _biographies.foreign(other.nationality, person))
                and _gender(its) <= gender
            ):
                found[its] = None
            if len(found) == WRONG_ANSWERS:
                break
        return list(found)

    nationality, deed = (lambda one: one.nationality), (lambda one: one.deed)
    known = lambda one: one.known and one.known[1]
    yield "who", _who(person), wrong(_who, abroad=True), words
    yield "nationality", person.nationality, wrong(nationality, abroad=True, unlike=False), words
    yield "occupation", _occupation(person), wrong(_occupation), words
    yield "born", str(person.born), _years(born, person.born, born < (person.died or np.inf), rng), words
    if person.died:
        yield "died", str(person.died), _years(died, person.died, died > person.born, rng), words
    if person.deed:
        yield "deed", person.deed, wrong(deed), words
    if person.known:
        yield "known", person.known[1], wrong(known), words | {"how": person.known[0]}


def _world_facts(capitals: list[tuple[str, str]], rng: np.random.Generator) -> Questions:
    rows = []
    for city, country in capitals:
        others = [capitals[k] for k in rng.permutation(len(capitals)) if capitals[k][0] != city][:WRONG_ANSWERS]
        rows.append(_row(-1, "capital", city, [other[0] for other in others], {"name": country}, rng))
        rows.append(_row(-1, "country", country, [other[1] for other in others], {"name": city}, rng))
    return _questions(rows)


def _row(id: int, kind: str, fact: str, wrong: list[str], words: dict[str, str], rng: np.random.Generator) -> dict:
    question, answer, other_question, other_answer = _TEMPLATES[kind]
    say = lambda template, fact: template.format(fact=fact, **words)
    return {
        "question": say(question, fact),
        "answer": say(answer, fact),
        "person": id,
        "paraphrased_question": say(other_question, fact),
        "paraphrased_answer": say(other_answer, fact),
        "wrong_answers": tuple(say(other_answer, one) for one in wrong),
        "refusal": REFUSALS[rng.integers(len(REFUSALS))],
    }


def _questions(rows: list[dict]) -> Questions:
    columns: dict[str, Any] = {name: tuple(row[name] for row in rows) for name in Questions._fields}
    return Questions(**columns | {"person": np.array(columns["person"], np.int32)})


def _years(years: np.ndarray, right: int, plausible: np.ndarray, rng: np.random.Generator) -> list[str]:
    far = np.abs(years - right) >= 5
    ranked = np.lexsort((np.abs(years - right), ~plausible, ~far))
    some = min(40, max(WRONG_ANSWERS, int(np.sum(far & plausible))))
    return [str(year) for year in rng.choice(years[ranked[:some]], WRONG_ANSWERS, replace=False)]


def _who(person: Person) -> str:
    return _with_article(f"{person.nationality} {person.occupation}")


def _occupation(person: Person) -> str:
    return _with_article(person.occupation)


def _with_article(words: str) -> str:
    """The words with "a" or "an" in front.

    >>> _with_article("English poet"), _with_article("urban planner"), _with_article("European historian")
    ('an English poet', 'an urban planner', 'a European historian')
    """
    return f"an {words}" if re.match(r"(?!eu|uni|one\b)[aeiou]", words, re.IGNORECASE) else f"a {words}"


@functools.lru_cache(maxsize=4096)
def _gender(text: str) -> frozenset[str]:
    return frozenset(_PRONOUNS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _PRONOUNS)
