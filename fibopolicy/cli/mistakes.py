"""Mistakes in the command line, as tyro tells them, in one plain line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from fibopolicy.errors import UserError, unknown

#: What Python says of a word that is no value of the option's type -> what was
#: expected.
_EXPECTED = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Failed to parse key-value pairs": "pairs of a name and a value",
}


def mistake(box: str, words: list[str], verbs: Collection[str]) -> UserError:
    """What is wrong with the command line `words`, from the box that tyro drew about it."""
    # A title, and parts between rules; in ASCII where the terminal knows no better.
    lines = [line.strip("\u2502\u256d\u256e\u256f\u2570").rstrip() for line in box.splitlines()]
    _, *parts = re.split("^ {0,2}(?:\u2500.*|-{3,})\n", "\n".join(lines), flags=re.MULTILINE)
    told = " ".join(parts[0].split())
    nested = words[0] in ("study", "profile", "robomimic")
    verb = " ".join(words[: 2 if nested else 1]) if words[0] in verbs else ""
    where = f"; see {' '.join(('fibopolicy', *verb.split()))} --help"
    if verb and (
        subverbs := re.search("Available subcommands: (.*)", " ".join(" ".join(parts[1:2]).split()))
    ):
        return unknown(f"verb of {words[0]}:", words[1], subverbs[1].split(", "))
    if told.startswith("Missing from"):
        return UserError(f"{verb} needs {_missing(parts[0], words)}{where}")
    if told.startswith("Unrecognized"):
        odd = (
            re.sub(r" \(applied to [^)]*\)|Unrecognized[^:]*: |Arguments are applied.*", "", told)
            .replace(",", " ")
            .split()
        )
        options = [word for word in odd if word.startswith("-")]
        if not options:
            return UserError(f"{verb} does not know what to do with {odd[0]!r}{where}")
        return UserError(
            f"{verb or 'fibopolicy'} has no option {options[0]}{_near(parts, verb)}{where}"
        )
    if found := re.match(r"Missing value for argument '(?:what\.)?(.+?)'", told):
        return UserError(
            (
                f"{found[1]} needs a value"
                if found[1].startswith("-")
                else f"{verb} needs {found[1].upper()}"
            )
            + where
        )
    if found := re.match(
        r"invalid choice '(.*)' for argument '(?:what\.)?(.+?)'\. Expected one of \((.*?),?\)", told
    ):
        name = found[2] if found[2].startswith("-") else verb
        return UserError(
            f"{name}: expected {found[3].replace(', ', ' or ')}, got {found[1]!r}{where}"
        )
    if found := re.match(r"Error parsing (\S+): (.*)", told):
        expected = next(
            (text for start, text in _EXPECTED.items() if found[2].startswith(start)), ""
        )
        value = found[2].rpartition(": ")[2] if "'" in found[2] else ""
        reason = f"expected {expected}{f', got {value}' if value else ''}" if expected else found[2]
        return UserError(f"{found[1]}: {reason}{where}")
    return UserError(f"{told.rstrip('.')}{where}")


def _missing(part: str, words: list[str]) -> str:
    """What must be given: the lines one step further in than the first; their
    explanations stand another step in.
    """
    first, *rest = part.splitlines()
    step = len(first) - len(first.lstrip()) + 4
    names = [line.split()[0].strip("{}") for line in rest if len(line) - len(line.lstrip()) == step]
    typos = [
        (word, near[0])
        for word in words
        if word.startswith("-") and (near := difflib.get_close_matches(word, names, 1))
    ]
    meant = "".join(f"; did you mean that by {word}?" for word, name in typos if word != name)
    return " and ".join(names) + meant


def _near(parts: list[str], verb: str) -> str:
    """The option of this verb that tyro finds most alike."""
    option = ""
    for line in "".join(part for part in parts if part.lstrip().startswith("Perhaps")).splitlines():
        option = line.split()[0] if line.lstrip().startswith("--") else option
        if line.strip() == f"in fibopolicy {verb} --help":
            return f", did you mean {option}?"
    return ""
