"""The wheel holds every folder, and the top-level kernels/ shadows nobody."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_source_folder_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(project["tool"]["setuptools"]["packages"])
    library = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("supra/**/__init__.py")
    }
    kernels = {
        ".".join(("supra", *p.parent.relative_to(ROOT).parts)) for p in ROOT.glob("kernels/**/*.py")
    }
    assert declared == library | kernels | {"supra.kernels"}


def test_top_level_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "transformers asks for Hugging Face's package `kernels` by name, and would find ours"
    )


def test_kernels_import_from_anywhere(tmp_path):
    code = "import supra.kernels.linear_attention"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
