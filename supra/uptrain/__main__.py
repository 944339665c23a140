"""`accelerate launch -m supra.uptrain --config supra …` runs the installed package."""

import sys

from supra.cli import main

main(["uptrain", *sys.argv[1:]])
