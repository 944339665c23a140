"""accelerate launch recipes/uptrain.py --config supra data.path=foo.jsonl"""

from supra.errors import command
from supra.uptrain import main

if __name__ == "__main__":
    command(main)()
