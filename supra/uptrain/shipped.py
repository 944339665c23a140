"""Recipes and files for `accelerate launch` that come with the package."""

from pathlib import Path

from supra.errors import UserError, check_choice
from supra.settings.recipe_files import RECIPES

CONFIGS, LAUNCH = RECIPES / "configs", RECIPES / "launch"


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises UserError if there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if "/" in str(name) or path.suffix:
        if path.is_dir():
            raise UserError(f"config {str(path)!r} is a folder: name a YAML file in it")
        own = path.stem in names()
        hint = f"; the recipe of that name that comes with supra is --config {path.stem}"
        raise UserError(f"no such config file: {path}{hint if own else ''}")
    check_choice("recipe", str(name), names())
    return CONFIGS / f"{name}.yaml"
