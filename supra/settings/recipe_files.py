"""Where the files of recipes/ are that come with the package."""

from pathlib import Path

_SUPRA = Path(__file__).resolve().parents[1]
# a wheel has them in supra/uptrain/, where setup.py puts them, a checkout at its top
RECIPES = next(
    x / "recipes" for x in (_SUPRA / "uptrain", _SUPRA.parent) if (x / "recipes").is_dir()
)
