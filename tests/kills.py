"""Kill commands that write for long at random moments, and check what the next run makes: `supra
convert`, `supra uptrain` and `supra sample`.

    python -m tests.kills --kills 100 --seed 0     # of each command; make test-kill

After the next run of the same command the result equals an undisturbed one bit by bit, and nothing
is left over: no staging folder, no partial file, no more checkpoints than checkpoint.keep. The
killed command must print no traceback. One start in twelve is cold, in a new Python; the others are
forks of a process that has imported everything, which saves the time of imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import datasets
import torch
import yaml
from tqdm import tqdm

from supra import cli, testing
from supra.conversion.convert import convert
from supra.serving import sampling  # noqa: F401 (imported for the forks)
from supra.uptrain import loop  # noqa: F401 (imported for the forks)

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COLD = 12  # one start in this many
AGAIN = 1 / 3  # of the kills hit the run after a kill
PATIENCE = 120  # seconds for a run to end
# exit codes of a killed command: of the signal, of a shell's convention, or 0 if it was done before
ENDS = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (-15, 143, 130, 0), signal.SIGINT: (-2, 130, 0)}
DONE = (
    "holds a finished run",
    "is not empty",
    "exists: name a new file",
)  # the errors for a finished result
KEEP = 2


def convert_words(files: Path, trial: Path) -> list[str]:
    words = ["convert", "--model", str(files / "teacher"), "--out", str(trial / "out")]
    return [*words, "--mixer", "gated", "--shard-size", "0.0001"]


def uptrain_words(files: Path, trial: Path) -> list[str]:
    """Calibration, layers, the teacher through a cache; evaluations and checkpoints between."""
    settings = {
        "student": str(files / "student"),
        "teacher": str(files / "teacher"),
        "out": str(trial / "out"),
        "data": {
            "path": str(files / "text.jsonl"),
            "sequence_length": 16,
            "eval_documents": 3,
        },
        "calibrate": {"tokens": 64},
        "align": {"tokens": 4 * 32},
        "distill": {"tokens": 10 * 32, "top_k": 8, "cache": str(trial / "cache")},
        "batch": {"size": 2},
        "precision": "fp32",
        "eval": {"every": 4, "tokens": 64},
        "checkpoint": {"every": 2, "keep": KEEP},
    }
    config = trial / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return ["uptrain", "--config", str(config)]


def sample_words(files: Path, trial: Path) -> list[str]:
    words = ["sample", "--model", str(files / "teacher"), "--out", str(trial / "own.jsonl")]
    return [*words, "--tokens", "2000", "--batch", "8", "--length", "20"]


def make_files(files: Path) -> None:
    testing.tiny_checkpoint(files / "teacher")
    convert(str(files / "teacher"), files / "student", mixer="gated")
    with open(files / "text.jsonl", "w") as file:
        for number in range(40):
            text = f"The river rises {number} times. " * (9 - number % 7)
            print(json.dumps({"text": text}), file=file)


class Process:
    """A running command, forked or cold; its output goes to `said`."""

    def __init__(self, words: list[str], trial: Path, cold: bool):
        self.said, self.cache = trial / "said.txt", trial / "datasets"
        self.popen = self.pid = None
        if cold:
            environment = os.environ | {"HF_DATASETS_CACHE": str(self.cache)}
            with open(self.said, "wb") as said:
                self.popen = subprocess.Popen(
                    [sys.executable, "-m", "supra", *words],
                    cwd=ROOT, env=environment, stdout=said, stderr=said,
                )  # fmt: skip
            self.pid = self.popen.pid
        else:
            self.pid = os.fork() or self._run(words)

    def _run(self, words: list[str]) -> None:
        """Run in the child, which ends here."""
        code = 1
        try:
            said = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            datasets.config.HF_DATASETS_CACHE = self.cache
            cli.main(words)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs."""
        end = time.monotonic() + seconds
        while True:
            if self.popen is not None:
                code = self.popen.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if pid else None
            if code is not None or time.monotonic() > end:
                return code
            time.sleep(0.002)

    def kill(self, number: signal.Signals) -> int | None:
        os.kill(self.pid, number)
        code = self.wait(PATIENCE)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(PATIENCE)
        return code


@dataclass
class Command:
    name: str
    words: callable
    files: Path
    seconds: dict[bool, float] = field(default_factory=dict)  # of an undisturbed run, by `cold`
    made: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, Counter] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def undisturbed(self, trial: Path) -> None:
        for cold in (True, False):
            shutil.rmtree(trial, ignore_errors=True)
            trial.mkdir()
            started = time.monotonic()
            process = Process(self.words(self.files, trial), trial, cold)
            if process.wait(PATIENCE) != 0:
                sys.exit(f"{self.name} does not run:\n{process.said.read_text()}")
            self.seconds[cold] = time.monotonic() - started
            self.made = contents(trial)

    def trial(self, trial: Path, chance: random.Random, kills: int) -> int:
        """Kill a random number of runs in a row, at most `kills`, then let one end. Returns the
        number of kills."""
        trial.mkdir()
        words, done = self.words(self.files, trial), 0
        while True:
            number, cold = chance.choice(SIGNALS), chance.randrange(COLD) == 0
            self.kill(words, trial, number, cold, chance.random())
            done += 1
            if done == kills or chance.random() > AGAIN:
                break
        process = Process(words, trial, cold=False)
        code = process.wait(PATIENCE)
        said = process.said.read_text(errors="replace")
        row = self.rows[number.name]
        if code is None:
            process.kill(signal.SIGKILL)
        if code != 0 and not refused_as_done(code, said):
            self.fault(row, trial, "does not go on", f"exit code {code}: {said[-500:]}")
        now = contents(trial)
        for name in sorted(self.made.keys() - now.keys()):
            self.fault(row, trial, "other result", f"no {name}")
        for name in sorted(now.keys() - self.made.keys()):
            self.fault(row, trial, "left over", name)
        for name in sorted(now.keys() & self.made.keys()):
            if now[name] != self.made[name]:
                self.fault(row, trial, "other result", name)
        if not any(fault.startswith(f"{trial} ") for fault in self.faults):
            shutil.rmtree(trial)
        return done

    def kill(
        self, words: list[str], trial: Path, number: signal.Signals, cold: bool, moment: float
    ) -> None:
        row = self.rows.setdefault(number.name, Counter())
        process = Process(words, trial, cold)
        code = process.wait(moment * self.seconds[cold])
        row["kills"] += 1
        row["cold"] += cold
        if code is not None:
            row["done before"] += 1
            return
        code = process.kill(number)
        said = process.said.read_text(errors="replace")
        if code not in ENDS[number] and not refused_as_done(code, said):
            self.fault(row, trial, "exit code", f"{number.name}: {code}: {said[-500:]}")
        if "Traceback" in said:
            self.fault(row, trial, "traceback", f"{number.name}: {said[-2000:]}")

    def fault(self, row: Counter, trial: Path, kind: str, what: str) -> None:
        row[kind] += 1
        self.faults.append(f"{trial} {self.name}, {kind}: {what}")


def refused_as_done(code: int, said: str) -> bool:
    """Whether a run found the result of the one before it, which the signal came too late for."""
    return code == 2 and any(words in said for words in DONE)


def contents(trial: Path) -> dict[str, bytes]:
    """Every file and empty folder of a trial; the log without speeds, and of the last KEEP
    checkpoints only the last: a run that ended at a signal has one more, of that step."""
    found = {}
    checkpoints = sorted(trial.glob("out/checkpoints/step-*"))
    others = checkpoints[-KEEP:-1]
    for path in trial.rglob("*"):
        name = path.relative_to(trial).as_posix()
        if any(other in (path, *path.parents) for other in others):
            continue
        if name.startswith("datasets") or name in ("said.txt", "config.yaml", "out/config.yaml"):
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                found[name] = b""
        elif name == "out/log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                for cost in ("tokens_per_second", "memory_gb"):
                    line.pop(cost, None)
            found[name] = json.dumps(lines).encode()
        else:
            found[name] = path.read_bytes()
    return found


COLUMNS = (
    "kills", "cold", "done before", "other result", "left over", "does not go on", "exit code",
    "traceback",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill commands at random moments.")
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("convert", "uptrain", "sample"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # shells make jobs in the background ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.monitor_interval = 0  # its thread would be missing in forks
    # tqdm's own lock is shared with forks, and one that is killed while it holds it never lets go
    tqdm.set_lock(threading.RLock())
    folder = Path(tempfile.mkdtemp(prefix="supra-kills-"))
    files = folder / "files"
    if os.fork() == 0:  # torch must compute only in forks
        make_files(files)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit("no files to try it on")
    makers = {"convert": convert_words, "uptrain": uptrain_words, "sample": sample_words}
    commands = [
        Command(name, words, files)
        for name, words in makers.items()
        if arguments.only in (None, name)
    ]
    chance = random.Random(arguments.seed)
    for command in commands:
        command.undisturbed(folder / f"{command.name}-undisturbed")
        done = 0
        with tqdm(total=arguments.kills, desc=command.name, unit="kill") as bar:
            while done < arguments.kills:
                trial = folder / f"{command.name}-{done}"
                now = command.trial(trial, chance, arguments.kills - done)
                done += now
                bar.update(now)
    report(commands)
    if any(command.faults for command in commands):
        sys.exit(f"what went wrong is in {folder}")
    shutil.rmtree(folder)


def report(commands: list[Command]) -> None:
    for command in commands:
        print("\n".join(command.faults))
    print("".join(f"{name:>16}" for name in ("", "", *COLUMNS)))
    for command in commands:
        for name, row in sorted(command.rows.items()):
            print("".join(f"{x:>16}" for x in (command.name, name, *(row[x] for x in COLUMNS))))


if __name__ == "__main__":
    main()
