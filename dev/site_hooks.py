"""Hooks of mkdocs: files outside of docs/ that pages link to, help texts, and tables of options."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
HELP = "<!-- help -->"
OPTIONS = re.compile("<!-- options of (\\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to, at the same path below the site."""
    texts = (path.read_text("utf-8") for path in Path(config.docs_dir).glob("*.md"))
    for name in sorted({name for text in texts for name in OUTSIDE.findall(text)}):
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give links that leave docs/, or enter it, the site's paths, and fill in what is generated."""
    markdown = re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    if "/" not in page.file.src_uri:
        markdown = OUTSIDE.sub(r"](\1", markdown)
    markdown = OPTIONS.sub(lambda found: options_of(found[1]), markdown)
    return markdown.replace(HELP, help_texts()) if HELP in markdown else markdown


def help_texts() -> str:
    """The help of every command, as it is printed."""
    from mlx_edgelora.__main__ import COMMANDS  # noqa: PLC0415 - for one page only

    return "\n\n".join(
        f"## mlx-edgelora {name}\n\n```text\n{printed(name, '--help')}\n```" for name in COMMANDS
    )


def printed(*arguments: str) -> str:
    """What a command prints, in 80 columns and without colours."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_edgelora", *arguments],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def options_of(name: str) -> str:
    """A table of the fields of a dataclass of options, with their help texts."""
    from mlx_edgelora import config  # noqa: PLC0415 - for one page only

    rows = ["| field | default | |", "|---|---|---|"]
    for field in dataclasses.fields(getattr(config, name)):
        default = "" if field.default in (None, dataclasses.MISSING) else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows)
