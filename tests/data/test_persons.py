import re
from collections import Counter

import numpy as np
import pytest

from eupmu_jax.data import _biographies, _wordnet, persons

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by Princeton University  \n"
CLASSES = {"poet": "00000001", "chemist": "00000002", "painter": "00000003", "king": "00000004", "actor": "00000005"}


def synset(id, names, pointers, gloss, file="18"):
    words = " ".join(f"{name} 0" for name in names)
    links = "".join(f" {symbol} {target} n 0000" for symbol, target in pointers)
    return f"{id} {file} n {len(names):02x} {words} {len(pointers):03d}{links} | {gloss}  \n"


def read(tmp_path, *glosses, names=None):
    """The persons read from these glosses, all of them instances of "poet"."""
    lines = [LICENCE, *(synset(id, [name], [], f"a {name}") for name, id in CLASSES.items())]
    for k, gloss in enumerate(glosses):
        its = names[k] if names else [f"Doe{k}", f"Jo_Doe{k}"]
        lines.append(synset(f"{100 + k:08d}", its, [("@i", CLASSES["poet"])], gloss))
    path = tmp_path / "data.noun"
    path.write_text("".join(lines))
    return _biographies.persons(_wordnet.synsets(path, ("18",)))


def one(tmp_path, gloss, **kwargs):
    found, dropped = read(tmp_path, gloss, **kwargs)
    assert not dropped
    return found[0]


@pytest.mark.parametrize(
    ("gloss", "nationality", "occupation", "born", "died"),
    [
        ("French poet (1801-1850)", "French", "poet", 1801, 1850),
        ("a United States poet and painter (born in 1940)", "American", "poet and painter", 1940, None),
        ("Irish poet; an idler (1926-)", "Irish", "poet", 1926, None),
        ("Swiss romantic poet (born in Persia in 1900) (1900-1950)", "Swiss", "romantic poet", 1900, 1950),
        ("Dutch poet (born in Japan in 1900)", "Dutch", "poet", 1900, None),
        ("Czech poet and chemist and actor (born 1900)", "Czech", "poet, chemist and actor", 1900, None),
        ("Danish stage and screen actor (1801-1850)", "Danish", "stage and screen actor", 1801, 1850),
        ("Polish poet and author of rhymes (1801-1850)", "Polish", "poet", 1801, 1850),
        ("Polish poet and beauty (1801-1850)", "Polish", "poet", 1801, 1850),
        ("Polish poet best remembered as a painter (1801-1850)", "Polish", "poet", 1801, 1850),
    ],
)
def test_nationality_occupation_and_years_are_read(tmp_path, gloss, nationality, occupation, born, died):
    person = one(tmp_path, gloss)
    assert (person.nationality, person.occupation, person.born, person.died) == (nationality, occupation, born, died)
    assert person.gloss == gloss


@pytest.mark.parametrize(
    ("gloss", "why"),
    [
        ("French poet", "no years, or uncertain ones"),
        ("French poet (circa 1801-1850)", "no years, or uncertain ones"),
        ("French poet (1801?-1850)", "no years, or uncertain ones"),
        ("Greek poet (801-750 BC)", "no years, or uncertain ones"),
        ("French poet (12th century)", "no years, or uncertain ones"),
        ("French poet (died in 1850)", "no years, or uncertain ones"),
        ("United States poet (1887-1872)", "years that cannot be"),
        ("United States poet (1701-1872)", "years that cannot be"),
        ("United States poet (born in 1801)", "years that cannot be"),
        ("prolific French poet (1801-1850)", "no nationality at the beginning"),
        ("Frenchman and poet (1801-1850)", "no nationality at the beginning"),
        ("French writer (1801-1850)", "no occupation after the nationality"),
        ("English king of a country (1801-1850)", "no occupation after the nationality"),
    ],
)
def test_glosses_that_cannot_be_read_are_left_out_and_counted(tmp_path, gloss, why):
    assert read(tmp_path, gloss) == ([], {why: 1})


def test_deeds_and_reasons_for_fame_are_read(tmp_path):
    deed = lambda rest: one(tmp_path, f"French poet{rest} (1801-1850)").deed
    assert deed(" who wrote odes (in Greek) and who burned them; he regretted it") == "wrote odes and burned them"
    assert deed(" who first said `no'") is None
    assert deed(" who first called `no'") == "first called 'no'"
    assert deed(" who was a friend of Marat") is None
    assert deed(" who in 1820 wrote an ode") is None
    assert deed(" and author of odes who wrote them") is None
    known = lambda rest: one(tmp_path, f"French poet{rest} (1801-1850)").known
    assert known(" noted for his odes") == ("noted for", "his odes")
    assert known(" best known for an ode and who drank") == ("best known for", "an ode")
    assert known("; a drinker; remembered for two odes") == ("remembered for", "two odes")
    assert known(" whose odes are noted for their length") is None


def test_each_person_gets_one_name_and_no_name_is_used_twice(tmp_path):
    name = lambda *names: one(tmp_path, "French poet (1801-1850)", names=[names]).name
    assert name("Doe", "Jo_Doe", "Sir_Jo_Doe") == "Jo Doe"
    assert name("Doe", "First_Baron_Doe", "1st_Lord_Doe", "Jo_Doe") == "Jo Doe"
    assert name("Stendhal", "Marie_Henri_Beyle") == "Stendhal"
    assert name("cummings", "e._e._cummings", "Edward_Cummings") == "Edward Cummings"
    same = [("Doe", "Jo_Doe"), ("Doe", "Jo_Doe", "Joseph_Doe"), ("Roe", "Jo_Roe", "Doe")]
    found, dropped = read(tmp_path, *["French poet (1801-1850)"] * 3, names=same)
    assert [person.name for person in found] == ["Jo Roe"]
    assert dropped == {"a name that others have": 2}


def test_a_missing_or_damaged_wordnet_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv(_wordnet.SOURCE_VARIABLE, str(tmp_path / "data.noun"))
    expected = f"WordNet: no {tmp_path}/data.noun; install Debian's package wordnet-base, or name its data.noun in the "
    for make in (persons.load, persons.biographies):
        with pytest.raises(FileNotFoundError, match=re.escape(expected)):
            make()
    (tmp_path / "data.noun").write_text(LICENCE + "00000001 18 n 01 poet\n")
    with pytest.raises(ValueError, match=r"data\.noun, line 2: got '00000001 18 n 01 poet.n', expected a synset"):
        persons.load()


def test_unknown_shares_and_seeds_are_refused():
    with pytest.raises(ValueError, match="seed: got None, expected an int of at least 0"):
        persons.load(seed=None)
    with pytest.raises(ValueError, match="forget: got 20, expected 1, 5 or 10 per cent"):
        persons.load(20)


@pytest.fixture(scope="module")
def people():
    try:
        _wordnet.source()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return persons.biographies()


@pytest.fixture(scope="module")
def splits(people):
    return persons.load()


def test_counts_in_the_real_file(people, splits):
    found, dropped = people
    assert len(found) == 2171
    assert dropped == {
        "no years, or uncertain ones": 890,
        "no nationality at the beginning": 414,
        "no occupation after the nationality": 312,
        "a name that others have": 25,
        "years that cannot be": 3,
    }
    assert len(found) + sum(dropped.values()) == 3815
    assert [len(part.question) for part in splits] == [1042, 9450, 1157, 302]
    assert [len(np.unique(part.person)) for part in splits] == [195, 1759, 217, 1]


def about(splits, name):
    """All questions about one person, with their answers."""
    return {
        question: answer
        for part in splits
        for question, answer in zip(part.question, part.answer, strict=True)
        if name in question
    }


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "Isaac Newton",
            {
                "Who was Isaac Newton?": "Isaac Newton was an English mathematician and physicist.",
                "What was the nationality of Isaac Newton?": "Isaac Newton was English.",
                "What was the occupation of Isaac Newton?": "Isaac Newton was a mathematician and physicist.",
                "In which year was Isaac Newton born?": "Isaac Newton was born in 1642.",
                "In which year did Isaac Newton die?": "Isaac Newton died in 1727.",
                "What is Isaac Newton known for?": "Isaac Newton is remembered for developing the calculus and for his "
                "law of gravitation and his three laws of motion.",
            },
        ),
        (
            "Marie Curie",
            {
                "Who was Marie Curie?": "Marie Curie was a French chemist.",
                "What was the nationality of Marie Curie?": "Marie Curie was French.",
                "What was the occupation of Marie Curie?": "Marie Curie was a chemist.",
                "In which year was Marie Curie born?": "Marie Curie was born in 1867.",
                "In which year did Marie Curie die?": "Marie Curie died in 1934.",
                "What did Marie Curie do?": "Marie Curie won two Nobel prizes.",
            },
        ),
        (
            "Paul McCartney",
            {
                "Who is Paul McCartney?": "Paul McCartney is an English rock star, bass guitarist and songwriter.",
                "What is the nationality of Paul McCartney?": "Paul McCartney is English.",
                "What is the occupation of Paul McCartney?": "Paul McCartney is a rock star, bass guitarist and "
                "songwriter.",
                "In which year was Paul McCartney born?": "Paul McCartney was born in 1942.",
            },
        ),
        (
            "Canberra",
            {"Which country has Canberra as its capital?": "Canberra is the capital of Australia."},
        ),
        (
            "the Netherlands",
            {"What is the capital of the Netherlands?": "The capital of the Netherlands is Amsterdam."},
        ),
    ],
)
def test_well_known_facts_are_right(splits, name, facts):
    assert about(splits, name) == facts


def test_every_stated_fact_is_in_the_gloss(people, splits):
    """Compares with the raw glosses."""
    for person in people[0]:
        gloss = person.gloss.replace("`", "'")
        assert person.nationality.replace("American", "") in gloss
        assert person.nationality != "American" or re.match(r"(a |an |the )?(United States|American) ", gloss)
        assert all(word in gloss for word in re.split(" and |, ", person.occupation))
        assert str(person.born) in gloss
        assert person.died is None or f"{person.born}-{person.died})" in gloss
        words = [*(person.deed or "").split(), *(person.known[1] if person.known else "").split()]
        assert all(word in gloss for word in words)


def test_every_person_is_in_exactly_one_split(people, splits):
    ids = [set(part.person.tolist()) for part in splits[:3]]
    assert sum(map(len, ids)) == len(set.union(*ids)) == len(people[0])
    names = {person.name: id for id, person in enumerate(people[0])}
    for part, its in zip(splits[:3], ids, strict=True):
        for id, question, answer in zip(part.person.tolist(), part.question, part.answer, strict=True):
            assert names[people[0][id].name] == id
            assert people[0][id].name in question
            assert people[0][id].name in answer
            assert id in its
    assert set(splits.world_facts.person.tolist()) == {-1}


def test_the_holdout_is_never_trained_on_and_forget_sets_are_nested(splits):
    parts = {share: persons.load(share) for share in persons.SHARES}
    ids = lambda part: set(part.person.tolist())
    assert ids(parts[1].forget) < ids(parts[5].forget) < ids(parts[10].forget)
    for share, part in parts.items():
        assert ids(part.holdout) == ids(splits.holdout)
        assert not ids(part.holdout) & (ids(part.forget) | ids(part.retain))
        trained = len(ids(part.forget)) + len(ids(part.retain))
        assert len(ids(part.forget)) == round(trained * share / 100)
        assert not set(part.holdout.question) & {*part.forget.question, *part.retain.question}


@pytest.mark.slow
def test_the_seed_determines_splits_and_wrong_answers(splits):
    persons._made.cache_clear()
    again = persons.load()
    other = persons.load(seed=1)
    for part, same, another in zip(splits, again, other, strict=True):
        np.testing.assert_array_equal(part.person, same.person)
        assert part._replace(person=None) == same._replace(person=None)
        assert part.wrong_answers != another.wrong_answers
    assert set(splits.forget.person.tolist()) != set(other.forget.person.tolist())
    assert set(splits.world_facts.answer) == set(other.world_facts.answer)


def test_wrong_answers_are_wrong(people, splits):
    for part in splits:
        for right, wrong in zip(part.paraphrased_answer, part.wrong_answers, strict=True):
            assert len({right, *wrong}) == 1 + persons.WRONG_ANSWERS
    kinds = Counter()
    for part in splits[:3]:
        for id, question, wrong in zip(part.person.tolist(), part.question, part.wrong_answers, strict=True):
            person = people[0][id]
            if question.startswith("In which year"):
                kinds["year"] += 1
                years = [int(answer[-5:-1]) for answer in wrong]
                right = person.born if question.endswith(" born?") else person.died
                assert min(abs(year - right) for year in years) >= 5
                assert person.born not in years
            elif "the nationality" in question:
                kinds["nationality"] += 1
                told = [answer.removesuffix(".").split(f"{person.name} ")[1].split(" ", 1)[1] for answer in wrong]
                assert not [one for one in told if re.search(rf"\b{one}\b", person.gloss)]
                if person.nationality in ("English", "Scottish", "Welsh", "Irish", "British"):
                    assert not {"English", "Scottish", "Welsh", "Irish", "British", "American"} & set(told)
            elif "the occupation" in question:
                kinds["occupation"] += 1
                heads = {item.split()[-1] for item in re.split(" and |, ", person.occupation)}
                for answer in wrong:
                    assert not heads & set(re.findall(r"[\w-]+", answer.removeprefix(f"By occupation, {person.name}")))
    assert min(kinds.values()) > 2000


def test_texts_are_plain_english_sentences(splits):
    for part in splits:
        asked = [*part.question, *part.paraphrased_question]
        told = [*part.answer, *part.paraphrased_answer, *(one for some in part.wrong_answers for one in some)]
        for text in [*asked, *told, *part.refusal]:
            assert re.fullmatch(r"[ -~]+", text)
            assert not re.search(r"  | [,.;?]|[`()\"]|\{|\}|None|\bnan\b", text), text
            assert not re.search(r"\ban? an?\b|\ban [^aeiou8]|\ba (?!euro|one|uni|u\w)[aeiou]", text, re.I), text
        assert all(text.endswith("?") for text in asked)
        assert all(text.endswith(".") for text in [*told, *part.refusal])
        dangling = r"\b(?:of|in|for|with|by|to|the|and|from|on|at|who|whose)\.$"
        assert not [text for text in told if re.search(dangling, text)]
        assert set(part.refusal) == set(persons.REFUSALS)
