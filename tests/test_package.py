"""What a user meets before the first call: metadata, the README's commands, the code and the links of every page.

Nothing about numbers: those are the other modules' business.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points, files, requires, version
from pathlib import Path

import pytest

import fusionops

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
COMMANDS = ['pip install ".[cli]" && fusionops compare', 'pip install ".[test]" && pytest']

FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path, language: str) -> list[str]:
    return [found["text"] for found in FENCE.finditer(page.read_text()) if found["language"] == language]


def extra(name: str) -> set[str]:
    """Names of the packages that an extra installs by itself, without its versions."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {re.match(r"[\w-]+", requirement)[0] for requirement in table[name]}


def test_metadata_has_the_version_of_the_package():
    assert version("fusionops") == fusionops.__version__


def test_changelog_has_the_version():
    assert f"\n## {fusionops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_core_dependencies_are_numpy_and_numba():
    core = [requirement for requirement in requires("fusionops") if "extra ==" not in requirement]
    assert {re.match(r"\w+", requirement)[0] for requirement in core} == {"numpy", "numba"}


def test_no_extra_but_the_gpu_ones_brings_cuda_libraries():
    for name in ("cli", "bench", "test", "dev"):
        assert extra(name).isdisjoint({"torch", "tensorflow", "cupy-cuda12x", "cupy-cuda13x"})
    assert (extra("cuda12"), extra("cuda13")) == ({"cupy-cuda12x"}, {"cupy-cuda13x"})


def test_types_are_installed_with_the_package():
    assert "fusionops/py.typed" in {str(file) for file in files("fusionops")}


def test_program_is_installed():
    (program,) = entry_points(group="console_scripts", name="fusionops")
    assert callable(program.load())


def test_readme_has_exactly_the_two_commands():
    assert [block.strip() for block in blocks(README, "sh")] == COMMANDS


def test_readme_code_does_what_its_comments_say(capsys):
    (code,) = blocks(README, "python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    said = re.findall(r"^(\w) = .*# (\(.*\))$", code, re.MULTILINE)
    assert [(name, str(names[name].shape)) for name, _ in said] == said
    report = capsys.readouterr().out
    assert all(re.search(f"^{part} ", report, re.MULTILINE) for part in ("runs on", "copies", "cost", "others"))


@pytest.mark.parametrize("page", [page for page in PAGES if page != README and blocks(page, "python")], ids=str)
def test_code_of_page_runs(page):
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_page_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []
