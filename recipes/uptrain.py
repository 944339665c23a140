"""accelerate launch recipes/uptrain.py --config supra data.path=foo.jsonl"""

import sys

from supra.cli import main

if __name__ == "__main__":
    main(["uptrain", *sys.argv[1:]])
