"""Options that several verbs share: written once, and in groups."""

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

import poise.cli
from poise.cli import options as o


@dataclass(frozen=True)
class Base:
    first: Annotated[int, typer.Option(help="One.")] = 1
    names: Annotated[list[str] | None, typer.Option("--name", "-n")] = None


@dataclass(frozen=True)
class Group(Base):
    flag: Annotated[bool, typer.Option("--flag")] = False


got: list = []


@o.grouped
def verb(
    *, what: Annotated[str, typer.Argument()], before: int = 0, group: Group, needed: Annotated[str, typer.Option()]
) -> None:
    """A verb."""
    got.append((what, before, group, needed))


def run(*words):
    app = typer.Typer()
    app.command()(verb)
    got.clear()
    return CliRunner().invoke(app, [*words])


def test_a_group_becomes_its_options_at_its_place_and_comes_as_one():
    app = typer.Typer()
    app.command()(verb)
    options = [p.name for p in typer.main.get_command(app).params]
    assert options[:6] == ["what", "before", "first", "names", "flag", "needed"]
    assert run("x", "--needed", "y").exit_code == 0 and got == [("x", 0, Group(), "y")]
    assert run("x", "--needed", "y", "--first", "3", "-n", "a", "-n", "b", "--flag", "--before", "2").exit_code == 0
    assert got == [("x", 2, Group(3, ["a", "b"], True), "y")]
    assert run("x").exit_code == 2 and not got
    assert verb.__name__ == "verb" and verb.__doc__ == "A verb."


def test_the_name_of_an_option_is_written_once():
    """Names that are written out; others are those of their parameters."""
    written: Counter = Counter()
    for path in Path(poise.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            texts = node.args if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Option" else []
            if isinstance(node, ast.Dict) and path.name == "options.py":
                texts = [one for value in node.values if isinstance(value, ast.Tuple) for one in value.elts]
            written.update(t.value for t in texts if isinstance(t, ast.Constant) and str(t.value).startswith("--"))
    assert len(written) > 30 and not [name for name, times in written.items() if times > 1]
