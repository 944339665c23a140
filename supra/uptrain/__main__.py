"""`accelerate launch -m supra.uptrain --config supra …`, wherever the package is installed."""

from supra.errors import command
from supra.uptrain import main

command(main)()
