"""Parses WordNet's one-line biographies: nationality, occupation, years, and what a person did or is known for."""

import functools
import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import NamedTuple

from eupmu_jax.data import _wordnet

# The adjective that opens a gloss -> the family of nationalities, several of which may apply to one person, and the
# words that name it in a gloss. "United States" in a gloss is an adjective too, and becomes "American".
_FAMILIES = {
    "American": "American|America|United States",
    "Argentine": "Argentine|Argentinian|Argentina",
    "Australian": "Australian|Australia",
    "Brazilian": "Brazilian|Brazil",
    "British": "British|Britain|United Kingdom|English|England|Scottish|Scotland|Welsh|Wales|Irish|Ireland",
    "Canadian": "Canadian|Canada",
    "Chilean": "Chilean|Chile",
    "Chinese": "Chinese|China",
    "Cuban": "Cuban|Cuba",
    "Danish": "Danish|Denmark|Norwegian|Norway|Swedish|Sweden|Finnish|Finland",
    "Dutch": "Dutch|Netherlands|Holland|Flemish|Flanders|Belgian|Belgium",
    "Egyptian": "Egyptian|Egypt",
    "French": "French|France|Alsatian|Alsace",
    "German": "German|Germany|Prussian|Prussia|Austrian|Austria|Swiss|Switzerland|Hungarian|Hungary|Czech|Bohemia"
    "|Czechoslovakian|Czechoslovakia|Moravia|Yugoslav|Yugoslavia|Croatia|Serbia",
    "Greek": "Greek|Greece",
    "Indian": "Indian|India",
    "Indonesian": "Indonesian|Indonesia",
    "Israeli": "Israeli|Israel|Palestine",
    "Italian": "Italian|Italy|Roman|Rome|Florentine|Florence|Venetian|Venice|Sicily",
    "Jamaican": "Jamaican|Jamaica",
    "Japanese": "Japanese|Japan",
    "Kenyan": "Kenyan|Kenya",
    "Mexican": "Mexican|Mexico",
    "Mongolian": "Mongolian|Mongolia",
    "Polish": "Polish|Poland",
    "Portuguese": "Portuguese|Portugal",
    "Romanian": "Romanian|Romania",
    "Russian": "Russian|Russia|Soviet|Soviet Union|Ukraine|Georgia|Lithuania|Latvia|Armenia",
    "South African": "South African|South Africa|Boer",
    "Spanish": "Spanish|Spain",
    "Turkish": "Turkish|Turkey",
    "Venezuelan": "Venezuelan|Venezuela",
    "Vietnamese": "Vietnamese|Vietnam",
}
# fmt: off
# Pairs of families between which borders or many people moved, so that both may apply to one person.
_CLOSE = {
    "American-British", "American-Canadian", "American-Israeli", "Argentine-Spanish", "Australian-British",
    "Brazilian-Portuguese", "British-Canadian", "British-Egyptian", "British-Indian", "British-Jamaican",
    "British-Kenyan", "British-South African", "Chilean-Spanish", "Cuban-Spanish", "Danish-German",
    "Danish-Russian", "Dutch-French", "Dutch-German", "Dutch-Indonesian", "Dutch-South African", "Dutch-Spanish",
    "French-German", "French-Italian", "French-Vietnamese", "German-Israeli", "German-Italian", "German-Polish",
    "German-Romanian", "Greek-Turkish", "Israeli-Polish", "Israeli-Russian", "Italian-Spanish", "Mexican-Spanish",
    "Polish-Russian", "Spanish-Venezuelan",
}
# fmt: on
_ADJECTIVES = (
    *_FAMILIES,
    *("English", "Scottish", "Welsh", "Irish", "Norwegian", "Swedish", "Finnish", "Flemish", "Belgian", "Austrian"),
    *("Swiss", "Hungarian", "Czech"),
)
_OPENING = re.compile(rf"(?:an? |the )?(United States|{'|'.join(_ADJECTIVES)}) (?=[a-zA-Z])")

# "(1642-1727)", "(born in 1948)", "(born in Russia in 1903)", "(1926-)"; no century, no "circa", nothing BC.
_YEARS = re.compile(r" \((?:([0-9]{3,4})-([0-9]{4})?|born (?:in )?(?:[A-Z][A-Za-z ]* in )?([0-9]{4}))\)$")
_LONGEST_LIFE, _OLDEST_LIVING = 110, 1890

_KNOWN_FOR = r"(?:best |chiefly )?(?:noted|known|famous|remembered) for"
# Where a list of occupations may end: at the end of an item, or where a statement about all of it begins.
_BOUNDARY = re.compile(
    r",? and |, | (?=(?:who|whose|best|chiefly|noted|known|famous|remembered|celebrated|honored)\b)|$"
)
# Words that no occupation contains.
_NO_ITEM = re.compile(
    r"\b(?:about|as|at|best|born|by|celebrated|during|for|from|in|of|on|resident|that|the|to|under|which|who|whose|with)\b"
)
# fmt: off
# Words for persons that name a relative, a rank or a fate, not an occupation; "film" and "life" are slips in WordNet.
_NO_OCCUPATION = {
    "aristocrat", "beauty", "best", "brother", "colonist", "conspirator", "dandy", "daughter", "father", "figure",
    "film", "half-brother", "heroine", "husband", "life", "man", "martyr", "mistress", "mother", "nobleman",
    "noblewoman", "one", "patriot", "religious", "sister", "slave", "son", "supporter", "widow", "wife", "wit", "woman",
}
# fmt: on
_DEED = re.compile(
    r"who ((?:(?:first|frequently|greatly|independently|later|secretly) )?"
    r"(?:[a-z]+ed|became|began|brought|broke|built|did|drew|fought|found|gave|grew|hit|held|kept|laid|led"
    r"|left|lost|made|overthrew|rode|set|spent|split|spoke|taught|told|took|won|wrote) .+)"
)
_KNOWN = re.compile(rf"({_KNOWN_FOR}) (.+?)(?: and who .+)?")
_PEER = re.compile(r"(?:[0-9]\w+|First|Second|Third|Fourth|Fifth|Sixth|Seventh|Eighth|Ninth|Tenth) ")


class Person(NamedTuple):
    """One person.

    Attributes:
      name: a name that no other person of WordNet has.
      nationality, occupation: as in "an {nationality} {occupation}".
      born: the year of birth.
      died: the year of death, or None if the gloss has none: alive in 2006, when it was published.
      deed: what the person did, starting with the verb ("discovered radium"), or None.
      known: how and for what the person is known ("noted for", "his frescoes"), or None.
      families: nationalities of the families that the gloss mentions.
      kinds: ids of what the person is an instance of and of what the occupation may mean, and of all their ancestors.
      gloss: WordNet's gloss, unchanged.
    """

    name: str
    nationality: str
    occupation: str
    born: int
    died: int | None
    deed: str | None
    known: tuple[str, str] | None
    families: frozenset[str]
    kinds: frozenset[str]
    gloss: str


def foreign(nationality: str, person: Person) -> bool:
    """Whether the nationality is of a family that the gloss does not mention and that is close to none of the person's.

    >>> ada = Person("Ada", "English", "poet", 1815, 1852, None, None, frozenset({"British"}), frozenset(), "")
    >>> foreign("Scottish", ada), foreign("American", ada), foreign("French", ada)
    (False, False, True)
    """
    its = _family(nationality)
    return its not in person.families and "-".join(sorted((its, _family(person.nationality)))) not in _CLOSE


@functools.cache
def _family(nationality: str) -> str:
    return next(name for name, words in _FAMILIES.items() if nationality in words.split("|"))


def persons(synsets: Mapping[str, _wordnet.Synset]) -> tuple[list[Person], dict[str, int]]:
    """The persons whose gloss can be parsed, in the order of the file, and how many were left out for each reason."""
    instances = {id: s for id, s in synsets.items() if s.file == _wordnet.PERSONS and _targets(s, "@i")}
    classes = [s for id, s in synsets.items() if s.file == _wordnet.PERSONS and id not in instances]
    nouns: dict[str, list[str]] = {}
    for id, name in ((s.id, name) for s in classes for name in s.names if name.islower()):
        if name not in _NO_OCCUPATION:
            nouns.setdefault(name, []).append(id)
    shared = Counter(name for s in instances.values() for name in set(s.names))
    found, dropped = [], Counter[str]()
    for synset in instances.values():
        read = _read(synset, nouns)
        if isinstance(read, str):
            dropped[read] += 1
        elif shared[read.name] > 1:
            dropped["a name that others have"] += 1
        else:
            meant = (id for noun in _heads(read.occupation) for id in nouns.get(noun, []))
            found.append(read._replace(kinds=_ancestors([*_targets(synset, "@i"), *meant], synsets)))
    return found, dict(dropped)


def _read(synset: _wordnet.Synset, nouns: Container[str]) -> Person | str:
    """The person, without kinds, or the reason why there is none."""
    if not (years := _YEARS.search(synset.gloss)):
        return "no years, or uncertain ones"
    born, died = int(years[1] or years[3]), int(years[2]) if years[2] else None
    if not (0 < died - born <= _LONGEST_LIFE if died else born >= _OLDEST_LIVING):
        return "years that cannot be"
    # Asides are removed before splitting, as they may contain semicolons.
    body, *others = re.sub(r" ?\([^()]*\)", "", synset.gloss[: years.start()]).replace("`", "'").split(";")
    if not (opening := _OPENING.match(body)):
        return "no nationality at the beginning"
    rest = body[opening.end() :].strip()
    occupation, end = _occupation(rest, nouns)
    if not occupation:
        return "no occupation after the nationality"
    rest = rest[end:].strip()
    deed = _DEED.fullmatch(rest)
    known = next(filter(None, (_KNOWN.fullmatch(part.strip()) for part in (rest, *others))), None)
    return Person(
        name=_name(synset.names),
        nationality="American" if opening[1] == "United States" else opening[1],
        occupation=occupation,
        born=born,
        died=died,
        deed=deed[1].replace(" and who ", " and ") if deed else None,
        known=(known[1], known[2]) if known else None,
        families=frozenset(name for name, words in _FAMILIES.items() if re.search(rf"\b(?:{words})\b", synset.gloss)),
        kinds=frozenset(),
        gloss=synset.gloss,
    )


def _occupation(text: str, nouns: Container[str]) -> tuple[str, int]:
    """The longest prefix of the text that is a well-formed list of nouns for persons, and where it ends.

    The list ends with the text, or where a statement about all of it begins ("who", "noted for"). "novelist and author
    of the Tarzan stories" gives "novelist", since the second half would be incomplete.
    """
    best: tuple[str, int] = ("", 0)
    for end in (boundary.start() for boundary in _BOUNDARY.finditer(text)):
        listed = text[:end]
        if _NO_ITEM.search(listed) or not re.fullmatch(r"[A-Za-z' ,-]+", listed):
            break
        items = _items(listed)
        # "stage and screen actor" is one occupation in two items; in a longer list each item must be an occupation.
        if not all(any(head in nouns for head in _heads(item)) for item in (items if len(items) > 2 else items[-1:])):
            continue
        best = (items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}", end)
    return best


def _items(listed: str) -> list[str]:
    return re.split(r",? and |, ", listed)


def _heads(occupation: str) -> list[str]:
    """The last word and the last two words of every item."""
    words = [item.split() for item in _items(occupation)]
    return [" ".join(item[-many:]) for item in words for many in (1, 2) if item]


def _name(names: tuple[str, ...]) -> str:
    """The full name that ends in the first name, if that is a surname, else the first name; never in lower case.

    >>> _name(("Newton", "Isaac Newton", "Sir Isaac Newton")), _name(("Voltaire", "Arouet", "Francois-Marie Arouet"))
    ('Isaac Newton', 'Voltaire')
    """
    capital = [name for name in names if name[0].isupper()] or [names[0]]
    full = (name for name in capital if name.endswith(f" {names[0]}") and not _PEER.match(name))
    return next(full, capital[0])


def _targets(synset: _wordnet.Synset, symbol: str) -> list[str]:
    return [target for its, target in synset.pointers if its == symbol]


def _ancestors(ahead: list[str], synsets: Mapping[str, _wordnet.Synset]) -> frozenset[str]:
    """The given ids, and those of all their ancestors within the file of persons."""
    found: set[str] = set()
    while ahead:
        id = ahead.pop()
        if id in synsets and id not in found:
            found.add(id)
            ahead += _targets(synsets[id], "@")
    return frozenset(found)
