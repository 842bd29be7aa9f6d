"""The documentation: its Python runs, its reference is complete, its pictures are small, and those that its code draws."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pages
import pytest

import paa_gpu
from paa_gpu import plot

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = pages.ROOT / "docs"
PICTURES = (".png", ".jpg")
BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]


def with_python() -> list:
    found = dict.fromkeys(block.page for block in BLOCKS)
    return [
        pytest.param(page, id=str(page.relative_to(pages.ROOT)), marks=[pytest.mark.long] * (page.stem == "export"))
        for page in found
    ]


@pytest.mark.parametrize("page", with_python())
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run([block for block in pages.blocks(page) if not block.missing], pages.given())
    if page.stem == "gallery":  # `python docs/pictures.py` keeps what it draws
        drawn, kept = ({path.stem for path in folder.iterdir() if path.suffix in PICTURES} for folder in (tmp_path, DOCS))
        assert drawn == kept - {"benchmarks", "scaling", "matching", "trees"}  # of `bench` and an example


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.missing], ids=lambda block: block.name)
def test_python_that_needs_more_than_is_here(block):
    """`make test-mmdet` runs these but for those of a GPU, which need one."""
    pytest.skip(f"{block.name} needs {' and '.join(block.missing)}")


def test_there_is_python_on_most_pages():
    assert len(with_python()) >= 10
    assert len(BLOCKS) >= 40


def test_every_fence_is_closed_and_of_a_known_kind():
    for page in pages.PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"python", "console", "text", "{toctree}", "{eval-rst}", "{include} ../CONTRIBUTING.md"}, page


def test_the_reference_has_every_public_name():
    reference = (DOCS / "reference.md").read_text()
    missing = [name for name in paa_gpu.__all__ if not re.search(rf"^\.\. auto\w+:: paa_gpu\.{name}$", reference, re.MULTILINE)]
    assert not missing


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text()
    listed = {name for tree in re.findall(r"```\{toctree\}\n.*?\n\n(.*?)```", index, re.DOTALL) for name in tree.split()}
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"}


def test_the_gallery_shows_every_picture_of_plot():
    gallery = (DOCS / "gallery.md").read_text()
    assert not [name for name in plot.__all__ if f"plot.{name}(" not in gallery]


def test_pictures_are_small_and_all_shown():
    shown = {name for page in pages.PAGES for name in re.findall(r"\]\((?:docs/)?([\w-]+\.(?:png|jpg))\)", page.read_text())}
    there = {path.name for path in DOCS.iterdir() if path.suffix in PICTURES}
    assert shown == there
    assert not [path.name for path in DOCS.iterdir() if path.name in there and path.stat().st_size > 150_000]


def functions():
    """Every function and class of the package whose docstring has arguments, with the function that takes them."""
    for path in sorted(Path(paa_gpu.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and "Args:\n" in (docstring := ast.get_docstring(node) or ""):
                inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
                yield pytest.param(inits[0] if inits else node, docstring, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize(("function", "docstring"), list(functions()))
def test_arguments_are_described_once_each(function, docstring):
    """A line that is not indented enough would begin another argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)[1]
    entries = re.findall(r"^    (?! )(.*)", section, re.MULTILINE)
    assert [entry for entry in entries if not re.match(r"\w+(, \w+)*:", entry)] == []
    described = [name for entry in entries for name in entry.split(":")[0].split(", ")]
    arguments = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    assert sorted(described) == sorted(set(arguments) - {"self"})
