"""Writes the pages of the documentation that come from the code: every command with its
options, and every configuration key. A hook of mkdocs, see mkdocs.yml.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from html import escape
from typing import Any

import griffe
import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fibopolicy.cli import COMMANDS, CONFIG

#: The dataclasses whose fields are configuration keys: module, class, where they are used.
CONFIGURATIONS = (
    ("fibopolicy.training.config", "TrainConfig", "`fibopolicy train`, `train(config)`"),
    ("fibopolicy.policies.base", "PolicyConfig", "`TrainConfig.policy`"),
    ("fibopolicy.training.config", "OptimizerConfig", "`TrainConfig.optimizer`"),
    ("fibopolicy.training.config", "ComputeConfig", "`TrainConfig.compute`"),
    ("fibopolicy.training.config", "ValidationConfig", "`TrainConfig.validation`"),
    ("fibopolicy.training.config", "RolloutConfig", "`TrainConfig.rollouts`"),
    ("fibopolicy.evaluation.config", "EvaluateConfig", "`fibopolicy evaluate`"),
    ("fibopolicy.study.config", "StudyConfig", "the function of a study"),
    ("fibopolicy.study.config", "StudyTask", "`StudyConfig.tasks`"),
    ("fibopolicy.study.config", "StudyEncoder", "`StudyConfig.encoders`"),
    ("fibopolicy.study.config", "StudyPolicy", "`StudyConfig.policies`"),
    ("fibopolicy.study.config", "StudySearch", "`StudyConfig.search`"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    pages = {"reference/commands.md": commands(), "reference/configuration.md": configuration()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


class Doctests(griffe.Extension):
    """Makes code blocks of the examples in docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            examples = r"^(>>> (?:.+\n?)+)"  # until an empty line
            obj.docstring.value = re.sub(examples, r"```pycon\n\1\n```\n", text, flags=re.MULTILINE)


# Commands


def commands() -> str:
    """The page of the commands."""
    lines = [
        "# Commands",
        "Every command and option, generated from the classes that declare them"
        " (`fibopolicy/cli/`). `fibopolicy COMMAND --help` prints the same.",
        "Exit codes: 0 done, 1 internal error, 2 an error that you can fix, 130 interrupted;"
        " `compare --gate` also 3 and 4."
        " `--debug` before or after a command shows tracebacks; `fibopolicy --version` prints"
        " versions.",
    ]
    for name, command in COMMANDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser: Any = tyro.extras.get_parser(command, config=CONFIG)
        lines += _command(f"fibopolicy {name}", parser, "##")
    return "\n\n".join(lines) + "\n"


def _command(name: str, parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    yield f"{heading} {name}"
    for paragraph in (parser.description or "").split("\n\n"):
        example = re.match(r"(?:Example|(In several processes.*)): (.*)", paragraph, re.DOTALL)
        text = " ".join(paragraph.split())
        if example and example[1]:
            yield f"{example[1]}:"
        yield f"```sh\n{' '.join(example[2].split())}\n```" if example else text
    shown = sorted(filter(_shown, parser._actions), key=lambda action: bool(action.option_strings))
    if rows := [_option(action) for action in shown]:  # positional arguments first
        yield "\n".join(["| argument | |", "|---|---|", *rows])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub, nested in action.choices.items():
                yield from _command(f"{name} {sub}", nested, heading + "#")


def _shown(action: argparse.Action) -> bool:
    helps = "--help" in action.option_strings
    return not helps and not isinstance(action, argparse._SubParsersAction)


def _option(action: argparse.Action) -> str:
    """A row of a table: the argument and its values; what it does, and its default."""
    text, default = action.help or "", ""
    if found := re.fullmatch(r"(.*?)\s*\((required|default: .*|repeatable)\)", text, re.DOTALL):
        text, default = found[1], found[2]
    value = _values(str(action.metavar or ""))
    name = f"{_code(action.option_strings[0])} {escape(value)}" if action.option_strings else value
    if default in ("default: None", "default: False", "repeatable"):
        default = ""
    shown = re.sub(r"default: (.*)", r"Default: `\1`.", default).replace(
        "required", "**Required.**"
    )
    return f"| {name.replace('|', '&#124;')} | {_text(text)} {shown} |"


def _values(metavar: str) -> str:
    """The values of an option: "{None}|{[STR [STR ...]]}" is written "STR ..."."""
    several = re.sub(r"\{?\[+([^\[\]]+) \[[^\[\]]+ \.\.\.\]+\}?", r"\1 ...", metavar)
    return several.replace("{None}|", "").replace("{None,", "{")


# Configuration keys


def configuration() -> str:
    """The page of the configuration keys."""
    lines = [
        "# Configuration keys",
        "Every key of every configuration class, generated from the dataclasses. Commands"
        " have an option for each: `batch_size` is `--batch-size`.",
    ]
    for module, name, used_in in CONFIGURATIONS:
        found = griffe.load(module, search_paths=["."])[name]
        lines += _configuration(found, f"{module}.{name}", used_in)
    return "\n\n".join(lines) + "\n"


def _configuration(found: Any, path: str, used_in: str) -> Iterator[str]:
    sections = found.docstring.parse("google", warn_unknown_params=False, warnings=False)
    yield f"## {found.name}"
    yield f"`{path}`, for {used_in}."
    in_class = {}
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            # "image_size, quality: rendering ..." describes two fields
            in_class = {
                key: item.description for item in section.value for key in item.name.split(", ")
            }
        elif section.kind is griffe.DocstringSectionKind.text:
            yield " ".join(section.value.split())
    rows = []
    for key, field in found.attributes.items():
        if field.annotation is None or "property" in field.labels:
            continue
        text = field.docstring.value if field.docstring else in_class.get(key, "")
        rows.append(f"| {_code(key)} | {_text(text)} {_default(field.value)} |")
    yield "\n".join(["| key | |", "|---|---|", *rows])


def _default(value: Any) -> str:
    """A sentence on the default of a field, from its source."""
    if value is None:
        return "**Required.**"
    text = str(value)
    if factory := re.fullmatch(r"field\(default_factory=(\w+)\)", text):
        text = f"{factory[1]}()"
    return "" if text in ("_DEFAULT", "None") else f"Default: {_code(text)}."


def _code(text: str) -> str:
    """Code in a cell of a table, where `|` would end the cell."""
    return f"<code>{escape(text).replace('|', '&#124;')}</code>"


def _text(text: str | None) -> str:
    return escape(" ".join((text or "").split()), quote=False).replace("|", "\\|")
