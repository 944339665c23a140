"""The parts of the package that pyproject.toml cannot describe; everything else stands there."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies recipes/*/*.yaml to supra/uptrain/recipes/; supra.settings.recipe_files finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has them already
            return
        for file in Path("recipes").glob("*/*.yaml"):
            target = Path(self.build_lib, "supra", "uptrain", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(file), str(target))


setup(
    packages=[
        *find_packages(include=["supra", "supra.*"]),
        "supra.kernels",  # without an __init__.py, so no finder sees it
        *(f"supra.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"supra.kernels": "kernels"},
    cmdclass={"build_py": BuildWithRecipes},
)
