"""What the documentation site is made of beyond the files in docs: the repository's own pages, and what is generated.

Pages link to each other as files of the repository, so that they also read well there; here those links are turned into
links between pages. A link to a file that is no page becomes its text.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from rich.console import Console

from liftbyimage import cli, doctor

ROOT = Path(__file__).resolve().parents[1]
# Page of the site → file of the repository
BROUGHT = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
DOCTOR = "<!-- doctor's output -->"
OFFLINE_SEARCH = "assets/offline-search.js"
SEARCH_WORKER = re.compile(r"assets/javascripts/workers/search\..*\.js")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    # In place of the script that the offline plugin would load from the network.
    config.extra["polyfills"] = [OFFLINE_SEARCH]
    return config


def on_files(files: Files, config: Any) -> Files:
    for page, source in BROUGHT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/options.md", content=options()))
    worker = next(file for file in files if SEARCH_WORKER.fullmatch(file.src_uri))
    files.append(File.generated(config, OFFLINE_SEARCH, content=offline_search(worker.content_string)))
    return files


def offline_search(worker: str) -> str:
    """The script with which pages opened as files can be searched: browsers start no worker from a file, but from a
    text that the page holds they do."""
    return f"""if (location.protocol === "file:") {{
  const source = URL.createObjectURL(new Blob([{json.dumps(worker)}], {{ type: "text/javascript" }}));
  window.Worker = class extends Worker {{ constructor() {{ super(source); }} }};
}}
"""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    source = BROUGHT.get(uri, f"docs/{uri}")
    if DOCTOR in markdown:
        markdown = markdown.replace(DOCTOR, f"```text\n{doctor_output()}```")
    return _LINK.sub(lambda link: _as_page_link(link, uri, source, files), markdown)


def _as_page_link(link: re.Match[str], uri: str, source: str, files: Files) -> str:
    mark, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link[0]
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    pages = {file: page for page, file in BROUGHT.items()}
    there = pages.get(in_repository, in_repository.removeprefix("docs/"))
    file = files.get_file_from_path(there)
    if file is None or file.inclusion.is_excluded():
        if not (ROOT / in_repository).exists():
            return link[0]  # which the strict build then reports
        return text
    relative = posixpath.relpath(there, posixpath.dirname(uri) or ".")
    return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"


def options() -> str:
    """Every command of the program with its arguments and options, as the program itself states them."""
    group = typer.main.get_command(cli.app)
    lines = [
        "# Every option",
        "",
        "As `liftbyimage COMMAND --help` states it; [the command line](../cli.md) says more.",
        "",
    ]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        lines += [
            f"## {name}",
            "",
            str(command.help or ""),
            "",
            "| option | what it says | default |",
            "| --- | --- | --- |",
        ]
        lines += [_option(parameter) for parameter in command.params if parameter.name != "help"]
        lines.append("")
    return "\n".join(lines)


def _option(parameter: Any) -> str:
    """One row: how it is written, what it says, and what a command does without it."""
    words = [parameter.metavar or parameter.name]
    if parameter.param_type_name == "option":
        value = f" {parameter.metavar}" if parameter.metavar else ""
        words = [f"{word}{value}" for word in (*parameter.opts, *parameter.secondary_opts)]
    about = re.sub(r"([\[\]|<])", r"\\\1", " ".join((parameter.help or "").split()))
    return f"| {', '.join(f'`{word}`' for word in words)} | {about} | {_default(parameter)} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    if isinstance(parameter.default, bool):
        return f"`{parameter.opts[0]}`" if parameter.default else ""
    plain = isinstance(parameter.default, str | int | float | Path) and parameter.default != ""
    return f"`{parameter.default}`" if plain else ""


def doctor_output() -> str:
    """What `liftbyimage doctor` says where the site is built."""
    console = Console(file=io.StringIO(), width=92, record=True)
    doctor.print_report(console, doctor.report())
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"
