"""Makes the page cli.md from the commands themselves, so that it lists what they have and nothing else."""

from __future__ import annotations

import html
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_INTRODUCTION = """# Command line

Made from the commands' own help: `gpuparse COMMAND --help` says the same in a terminal. Without an installed script,
`python -m gpuparse` stands for `gpuparse`.

| Exit status | Meaning |
|---|---|
| 0 | All done. |
| 1 | Some files were skipped, or errors were found. |
| 2 | Nothing was done, or a bad file or argument stopped the run. |
| 130 | Interrupted. Finished work is kept. |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page."""
    files.append(File.generated(config, "cli.md", content=cli_page()))
    return files


def cli_page() -> str:
    """The page as Markdown."""
    from gpuparse.cli import app

    root = typer.main.get_command(app)
    sections = [_INTRODUCTION, _table("Option", [p for p in root.params if _is_option(p)], {})]
    for name in sorted(root.commands):
        command = root.commands[name]
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        options = [p for p in command.params if _is_option(p)]
        arguments = [p for p in command.params if not _is_option(p)]
        names = [f"{p.name.upper()}{'...' * (p.nargs < 0)}" for p in arguments]
        usage = " ".join([f"gpuparse {name} [OPTIONS]", *names])
        sections.append(f"## gpuparse {name}\n\n```bash\n{usage}\n```\n")
        sections.append(_prose(command.help or ""))
        if arguments:
            sections.append(_table("Argument", arguments, hints))
        sections.append(_table("Option", options, hints))
    return "\n".join(sections)


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _prose(text: str) -> str:
    """The help text, its examples as code."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        line = " ".join(paragraph.split())
        example = re.fullmatch(r"(.*?):? ?(gpuparse .*)", line) if re.match(r"[^.]*: gpuparse ", line) else None
        if example:
            paragraphs.append(f"{example[1]}:\n\n```bash\n{example[2]}\n```")
        else:
            paragraphs.append(re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", _plain(line)))
    return "\n\n".join(paragraphs) + "\n"


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return re.sub(r"([*|_])", r"\\\1", html.escape(text, quote=False))


def _table(kind: str, parameters: list[Any], hints: dict[str, Any]) -> str:
    rows = [f"| {kind} | Value | Default | Meaning |", "|---|---|---|---|"]
    for parameter in parameters:
        if getattr(parameter, "hidden", False):
            continue
        if _is_option(parameter):
            names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        else:
            names = f"`{parameter.name.upper()}`"
        is_flag = getattr(parameter, "is_flag", False)
        value = "" if is_flag or not _is_option(parameter) else _value(hints[parameter.name])
        default = parameter.default
        shown = "" if is_flag or default is None or default == "" or callable(default) else f"`{default}`"
        meaning = _plain(getattr(parameter, "help", None) or "")
        rows.append(f"| {names} | {value} | {shown} | {meaning} |".replace("  ", " "))
    return "\n".join(rows) + "\n"


def _value(annotation: Any) -> str:
    """What an option takes, in words, from its type: list[X] and X | None as X."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if arguments:
        return _value(arguments[0])
    return {str: "text", int: "whole number", float: "number", Path: "path"}.get(annotation, annotation.__name__)
