"""`supra eval` as it was before its commands text, ablate, task and passkey: for one more version.

supra eval --model M --text FILE                    → supra eval text
supra eval --model M --text FILE --ablate[ A,B]     → supra eval ablate [--parts A,B]
supra eval --model M --task T                       → supra eval task --task T
supra eval --model M --task passkey                 → supra eval passkey
"""

import shlex
import sys


def renamed(arguments: list[str]) -> list[str]:
    """The arguments in today's spelling, with a note on stderr if that is another one."""
    options = list(arguments[1:])
    if arguments[:1] != ["eval"] or options[:1] in ([], ["-h"], ["--help"]):
        return list(arguments)
    if not options[0].startswith("-"):
        return list(arguments)
    task, ablate = _taken(options, "--task"), None
    if task is None:
        ablate = _taken(options, "--ablate")
    if task is not None:
        start = ["passkey"] if task == ["passkey"] else ["task", "--task", *task]
    elif ablate is not None:
        start = ["ablate", "--parts", *ablate] if ablate else ["ablate"]
    else:
        start = ["text"]
    today = ["eval", *start, *options]
    print(
        f"supra: note: supra eval has commands now, and the next version knows only the new "
        f"spelling: supra {shlex.join(today)}",
        file=sys.stderr,
    )
    return today


def _taken(options: list[str], name: str) -> list[str] | None:
    """Take an option out of the list: [its value], [] if it has none, None if it is not there."""
    for place, word in enumerate(options):
        found, equals, value = word.partition("=")
        if found != name:
            continue
        del options[place]
        if equals:
            return [value]
        if place < len(options) and not options[place].startswith("-"):
            return [options.pop(place)]
        return []
    return None
