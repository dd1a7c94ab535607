"""Errors, aims and attacks of a record in words, for a terminal and for a page."""

import unicodedata

from eupmu_jax.methods.eupmu_level import UNLIMITED


def printable(text: str) -> str:
    r"""The text with escapes in place of what would steer a terminal; line breaks and tabs stay.

    >>> printable("a letter\x1b[2J\r of 3 May")
    'a letter\\x1b[2J\\r of 3 May'
    """
    steers = lambda character: unicodedata.category(character).startswith("C") and character not in "\n\t"
    return "".join(c if not steers(c) else c.encode("unicode_escape").decode() for c in text)


def number(error: float | None, rates: bool) -> str:
    """An error as text; a percentage without its sign if errors are rates.

    >>> number(0.0512, True), number(0.0512, False), number(None, True)
    ('5.1', '0.0512', '-')
    """
    return "-" if error is None else f"{100 * error:.1f}" if rates else f"{error:.4g}"


def shown(error: float | None, rates: bool) -> str:
    """An error as text with its unit.

    >>> shown(0.0512, True), shown(2.5, False), shown(None, True)
    ('5.1 %', '2.5', '-')
    """
    return number(error, rates) + (" %" if rates and error is not None else "")


def measured_interval(reached: dict) -> tuple[float, float] | None:
    """The interval of a run's target, if it was measured."""
    level = reached["level"]
    ends = level.get("interval")
    known = ends and ends[0] is not None and (level["target"] < 1 or not reached["rates"])
    return ends if known else None


def aim(reached: dict) -> str:
    """The target of a run and its source, in words."""
    level, ends = reached["level"], measured_interval(reached)
    if level["target"] >= UNLIMITED:
        return "no target is known"
    interval = f" ({' to '.join(shown(end, reached['rates']) for end in ends)})" if ends else ""
    if "least" in reached:
        interval = f" (at least {shown(reached['least'], reached['rates'])}, given its noise)"
    source = {"unknown": "a model without knowledge of the condition"}.get(level["source"], level["source"])
    return f"the target is {shown(level['target'], reached['rates'])}, that of {source}{interval}"


def given_noise(reached: dict) -> str:
    """Why a target counts as reached by an error below it; empty for an error that is not below.

    >>> given_noise({"level": {"comparison": {"low": -0.1}, "forget_error": 0.03, "target": 0.07}})
    ', given its noise,'
    """
    level = reached["level"]
    return ", given its noise," if level["comparison"] and level["forget_error"] < level["target"] else ""


def auc(attack: dict) -> str:
    """The AUC of an attack with its interval, in words.

    >>> auc({"auc": 0.5, "low": 0.4, "high": 0.6})
    '0.50 (0.40 to 0.60)'
    """
    return "{auc:.2f} ({low:.2f} to {high:.2f})".format(**attack)
