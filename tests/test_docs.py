"""README and docs: links, commands, options, code and the site."""

import argparse
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import mlx_lm.lora
import pytest
import yaml

from mlx_edgelora.__main__ import COMMANDS
from mlx_edgelora.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [ROOT / "README.md", *(page for page in DOCS if page.name != "architectures.md")]
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "benchmarks").rglob("*.md"))]
PAGES += sorted((ROOT / "dev").glob("*.md"))
COLUMNS = 120
# Commands that take the options of `train` as well.
TAKE_TRAINING_OPTIONS = ("plan", "verify", "data")
# What pages name and no help lists: an abbreviation that is refused, and what `command` takes.
NO_FLAGS = {"--help", "--iter", "--debug"}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced and indented blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(path.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        numbers = (f"{slug}-{number}" for number in range(1, 100))
        found.add(next(name for name in (slug, *numbers) if name not in found))
    return found


def broken(path: Path) -> list[str]:
    """The links of a page to files or headings that are not there."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text("utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One\n## `Two` [words](x)!\n## One\n")
    page = tmp_path / "a.md"
    page.write_text("[](b.md#two-words) [](b.md#one-1) [](#a) [](c.md) [](b.md#three)\n# A\n")
    assert broken(page) == ["c.md", "b.md#three"]


@cache
def flags(command: str) -> frozenset[str]:
    """The options that a command's help lists."""
    taken = [command, "train"] if command in TAKE_TRAINING_OPTIONS else [command]
    return frozenset(flag for name in taken for flag in re.findall(r"--[a-z][\w-]*", help_of(name)))


def help_of(command: str) -> str:
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            argparse.ArgumentParser,
            "print_help",
            lambda self, file=None: printed.append(self.format_help()),
        )
        importlib.import_module(f"mlx_edgelora.{COMMANDS[command][0]}").main(["--help"])
    return printed[0]


def shown_commands(text: str) -> list[list[str]]:
    """The words of every mlx-edgelora command in a page's shell blocks."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("mlx-edgelora") + 1 :] for line in words if "mlx-edgelora" in line]


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_commands_and_their_options_exist(page):
    for command, *arguments in shown_commands(page.read_text("utf-8")):
        used = {word for word in arguments if word.startswith("--")} - {"--help"}
        assert used <= flags(command), command


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.parent != ROOT], ids=ids)
def test_options_in_sentences_exist(page):
    known = frozenset().union(*map(flags, COMMANDS))
    text = prose(page.read_text("utf-8"))
    spans = [span for span in re.findall(r"`([^`]+)`", text) if span.startswith("--")]
    assert {span.split()[0] for span in spans} - known - NO_FLAGS == set()


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_code_in_pages_is_code(page):
    text = page.read_text("utf-8")
    for code in blocks(text, "python"):
        compile(code, page.name, "exec")
    for content in blocks(text, "yaml"):
        TrainConfig.from_dict(yaml.safe_load(content))


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_files_that_pages_name_exist(page):
    for name in re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|sh|md|yaml))`", page.read_text("utf-8")):
        assert any((ROOT / top / name).exists() for top in ("", "mlx_edgelora", "docs")), name


def test_classes_that_the_architecture_names_exist():
    sources = (path.read_text("utf-8") for path in (ROOT / "mlx_edgelora").rglob("*.py"))
    classes = {name for text in sources for name in re.findall(r"^class (\w+)", text, re.MULTILINE)}
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    assert set(re.findall(r"`([A-Z]\w*[a-z]\w*)`", text)) <= classes


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_lines_are_wrapped(page):
    lines = prose(page.read_text("utf-8")).splitlines()
    assert [line for line in lines if len(line) > COLUMNS and line[0] != "|"] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_options_of_this_package_only_are_listed():
    page = (ROOT / "docs/differences-from-mlx-lm.md").read_text("utf-8")
    part = page.partition("Options that only this package has:")[2].partition("\n\n`")[0]
    own = {field.name for field in dataclasses.fields(TrainConfig)} - set(
        mlx_lm.lora.CONFIG_DEFAULTS
    )
    shared = {"config", "hf_dataset", "trust_remote_code"}  # known to mlx-lm, without a default
    shared |= {name for name in own if name.endswith("_feature")}
    assert set(re.findall(r"`(\w+)`", part)) == own - shared


def test_every_page_is_in_the_site():
    text = (ROOT / "dev/mkdocs.yml").read_text("utf-8")
    assert sorted(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)) == [p.name for p in DOCS]


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("mkdocstrings")), reason="needs mlx_edgelora[docs]"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file"]
    command += [ROOT / "dev/mkdocs.yml", "--site-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "command-line/index.html").read_text("utf-8")
    assert all(f"usage: mlx-edgelora {name}" in page for name in COMMANDS)
    assert "max_grad_norm" in (tmp_path / "api/index.html").read_text("utf-8")
