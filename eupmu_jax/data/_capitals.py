"""The capitals of countries, according to WordNet 3.0."""

from collections import Counter
from collections.abc import Mapping

from eupmu_jax.data import _wordnet

_NATIONAL_CAPITAL = "national capital"
# The English name, if WordNet lists another one first.
_ENGLISH = {
    "Bayrut": "Beirut",
    "Bruxelles": "Brussels",
    "Dimash": "Damascus",
    "Gran Santiago": "Santiago",
    "Kishinev": "Chisinau",
    "Kyyiv": "Kiev",
    "Teheran": "Tehran",
    "Warszawa": "Warsaw",
}
# fmt: off
# Capitals that are disputed, shared or moved, or whose country was renamed, since 2006 or before.
_UNSETTLED = {
    "Belgrade", "Bujumbura", "Colombo", "Dar es Salaam", "Jerusalem", "Kolonia", "La Paz", "Lhasa", "Mbabane",
    "Pretoria", "Putrajaya", "Riyadh", "Skopje", "Taipei", "Yangon",
}
# fmt: on
_ARTICLE = {
    "Bahamas",
    "Central African Republic",
    "Czech Republic",
    "Dominican Republic",
    "Gambia",
    "Maldives",
    "Netherlands",
    "Philippines",
    "Seychelles",
    "Solomon Islands",
    "United Arab Emirates",
}
# fmt: on


def capitals(synsets: Mapping[str, _wordnet.Synset]) -> list[tuple[str, str]]:
    """Pairs of a capital and its country, with its article if it has one, in the order of the file.

    The country is the one that the capital is a part of, else that of a synonym "capital of ...". Capitals are left out
    if they have neither, if two countries share the name, if they bear their country's name, or if they are unsettled.
    """
    found = []
    for synset in synsets.values():
        kinds = [synsets[target].names[0] for symbol, target in synset.pointers if symbol == "@i" and target in synsets]
        city = _ENGLISH.get(synset.names[0], synset.names[0])
        if _NATIONAL_CAPITAL in kinds and city not in _UNSETTLED and (country := _country(synset, synsets)):
            found.append((city, country))
    if not found:
        raise ValueError("WordNet: got no capital of a country, expected its complete data.noun")
    cities, countries = (Counter(names) for names in zip(*found, strict=True))
    # For "Luxembourg-Ville" and "Panama City" the question would contain the answer.
    told = lambda city, country: country.removeprefix("the ") in city
    return [
        (city, country)
        for city, country in found
        if cities[city] == countries[country] == 1 and not told(city, country)
    ]


def _country(capital: _wordnet.Synset, synsets: Mapping[str, _wordnet.Synset]) -> str | None:
    for whole in (synsets.get(target) for symbol, target in capital.pointers if symbol == "#p"):
        kinds = [] if whole is None else [synsets[target].names[0] for _, target in whole.pointers if target in synsets]
        if whole is not None and any(kind.endswith(("country", "Baltic State")) for kind in kinds):
            return f"the {whole.names[0]}" if whole.names[0] in _ARTICLE else whole.names[0]
    synonyms = (name.removeprefix("capital of ") for name in capital.names if name.startswith("capital of "))
    return next(synonyms, None)
