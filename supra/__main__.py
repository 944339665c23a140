"""`python -m supra` is `supra`."""

from supra.cli import main

main()
