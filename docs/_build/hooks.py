"""What mkdocs does beside its own work: pages made from the code, and files outside of docs/.

`make docs` runs it. Pages that are made here: the reference of the command line, that of the
settings, and the Markdown files of other folders, which the site shows beside its own.
"""

import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from generated import command_page, settings_page
from public import gaps

ROOT = Path(__file__).parents[2]
# file of the repository -> page of the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/README.md": "kernels/contract.md",
    "kernels/COMPILED.md": "kernels/compiled.md",
    "recipes/README.md": "recipes.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(?=[)#])")

_source = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings a folder where kernels/ lies inside of supra/, as it does once installed."""
    no_caches = shutil.ignore_patterns("__pycache__")
    for path, where in ((ROOT / "supra", "supra"), (ROOT / "kernels", "supra/kernels")):
        shutil.copytree(path, Path(_source.name) / where, ignore=no_caches)
    (Path(_source.name) / "supra/kernels/__init__.py").touch()  # griffe passes folders without it
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_source.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in docs/. Fails when the reference has gaps."""
    if found := gaps():
        raise PluginError("\n".join(found))
    pages = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in OUTSIDE.items()}
    pages["reference/cli.md"] = command_page()
    pages["reference/settings.md"] = settings_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Point links between docs/ and the rest of the repository at the pages of the site."""
    here = page.file.src_uri
    source = next((file for file, made in OUTSIDE.items() if made == here), f"docs/{here}")

    def target(match: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        made = OUTSIDE.get(file, file.removeprefix("docs/"))
        return posixpath.relpath(made, posixpath.dirname(here) or ".")

    return LINK.sub(target, markdown)
