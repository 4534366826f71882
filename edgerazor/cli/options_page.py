"""The page `OPTIONS.md`: every command's arguments and options in a table, with the recipe fields that they set.

`python -m edgerazor.cli.options_page > edgerazor/cli/OPTIONS.md`, or `make options`; a test compares the two.
"""

from __future__ import annotations

import typer

from edgerazor.cli.app import app
from edgerazor.cli.options import REQUIRED, Option, options_of
from edgerazor.recipe import default_of, fields_of, section_at, values_of

HEAD = """# Options of the command line

Made by `make options` from the table in [`options.py`](options.py); a test compares the two. Change the table, not
this page.

An option sets the field of the recipe that stands beside it, whose explanation and default `edgerazor show recipe`
prints; what a command line gives wins over `--recipe`, and that over the recipe of the working directory. Options
without a field say how to run.
"""


#: Field of a recipe -> its default, as code.
DEFAULTS = {path: f"`{default_of(field)}`" for path, field in fields_of()}


def render() -> str:
    """The whole page."""
    commands = {command.name: command.callback.__doc__ for command in app.registered_commands if command.callback}
    return "\n".join([HEAD, *(render_command(str(name), doc or "") for name, doc in commands.items())])


def render_command(name: str, doc: str) -> str:
    """A command: what it does, examples, the table of its options."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in doc.strip().split("\n\n")]
    summary = [paragraph for paragraph in paragraphs if not paragraph.startswith("Example: ")]
    examples = [paragraph.removeprefix("Example: ") for paragraph in paragraphs if paragraph.startswith("Example: ")]
    return "\n".join(
        [
            f"## {name}\n",
            *summary,
            "\n```",
            *examples,
            "```\n",
            "| option | value | default | field | what it is |",
            "|---|---|---|---|---|",
            *(row(option) for option in options_of(name)),
            "",
        ]
    )


def row(option: Option) -> str:
    """A row of a command's table."""
    cells = [
        ", ".join(f"`{form}`" for form in option.flag.replace("/", " ").split()),
        *value_and_default(option),
        f"`{option.field}`" if option.field else "",
        option.help,
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def value_and_default(option: Option) -> tuple[str, str]:
    """What an option takes, and what holds without it; empty where nothing does."""
    *sections, name = option.field.split(".")
    field = section_at(tuple(sections)).model_fields[name] if option.field else None
    default = "required" if option.default is REQUIRED else DEFAULTS.get(option.field, f"`{option.default or ''}`")
    default = "" if default in ("``", "`''`", "`null`", "`[]`", "`{}`") else default
    if option.type is bool:
        return "", default
    value = option.metavar or (values_of(field) if field is not None else "")
    kinds = {int: "a whole number", float: "a number", str: "text"}
    return value or kinds.get(option.type, "a path"), default


if __name__ == "__main__":
    typer.echo(render(), nl=False)
