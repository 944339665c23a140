"""`accelerate launch -m supra.uptrain --config supra …`, wherever the package is installed."""

import sys

from supra.cli import main

main(["uptrain", *sys.argv[1:]])
