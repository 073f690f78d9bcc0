"""What README and docs/ tell people to type is what the command line takes, and links lead on."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from halfbyte.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SCRIPTS = [path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")]


def commands(page):
    """Return the lines of code blocks that call halfbyte, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("halfbyte ")]


def parse(arguments):
    """Read arguments as the command line does, and do nothing with them."""
    group = typer.main.get_command(app)
    verb, *rest = arguments
    group.commands[verb].make_context(verb, rest)


@each_page
def test_commands_are_read(page):
    for arguments in commands(page):
        parse(arguments)


def test_there_are_commands_to_read():
    assert {arguments[0] for page in PAGES for arguments in commands(page)} > {"train", "merge"}
    with pytest.raises(Exception, match="No such option"):
        parse(["merge", "a", "b", "--sideways"])


@each_page
def test_options_exist(page):
    group = typer.main.get_command(app)
    known = {"--help", "--debug"}
    for script in SCRIPTS:
        known |= set(re.findall(r'"(--[a-z][a-z-]*)"', script.read_text()))
    for command in group.commands.values():
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    named = set(re.findall(r"`(--[a-z][a-z-]*)[^`]*`", page.read_text()))
    assert named <= known


@each_page
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
