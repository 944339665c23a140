"""Folders of runs that were interrupted, and the teacher's words that they kept."""

import json
import shutil
from pathlib import Path

from tests.faults.case import BINARY, DEEP, Case, Make, accepted, cut, file, put, refused, without

RESUME = "uptrain --config {yaml} out={run} distill.cache={run}/cache"
OTHER = RESUME.replace("distill.cache={run}/cache", "")
LAST = "checkpoints/step-00000002"
MODEL, OPTIMIZER = f"{LAST}/model.safetensors", f"{LAST}/optimizer.bin"
PLACE, RANDOM = f"{LAST}/data-0.json", f"{LAST}/random_states_0.pkl"


def _run(*changes) -> Make:
    """{run}: a copy of the shared run with changes to it."""

    def make(here: Path, common: Path) -> None:
        shutil.copytree(common / "stopped", here / "run")
        for change in changes:
            change(here / "run")

    return make


def _cached(content: bytes | None = None, share: float | None = None):
    """A change: every file of the cache."""

    def change(folder: Path) -> None:
        for path in (folder / "cache").rglob("*.safetensors"):
            old = path.read_bytes()
            path.write_bytes(content if share is None else old[: int(len(old) * share)])

    return change


def _cached_tensors(edit):
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        for path in (folder / "cache").rglob("*.safetensors"):
            save_file(edit(load_file(path)), path)

    return change


def _weights(edit):
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / MODEL)
        save_file(edit(found), folder / MODEL, {"format": "pt"})

    return change


def _place(**values):
    def change(folder: Path) -> None:
        found = json.loads((folder / PLACE).read_text()) | values
        put(folder / PLACE, json.dumps(found))

    return change


def _gone(name: str):
    return lambda folder: shutil.rmtree(folder / name)


def _pickled(folder: Path) -> None:
    """A change: an optimizer that would run a program."""
    put(folder / OPTIMIZER, b"cos\nsystem\n(S'touch supra-was-here'\ntR.")


FIRST = "model.model.norm.weight"
REFUSED = [
    ("weights are missing", [without(MODEL)], LAST),
    ("weights are cut", [cut(MODEL)], LAST),
    ("weights are empty", [file(MODEL, "")], LAST),
    ("weights are binary", [file(MODEL, BINARY)], LAST),
    ("weights lack a tensor", [_weights(lambda x: {k: v for k, v in x.items() if k != FIRST})],
     LAST),
    ("weights have a tensor more", [_weights(lambda x: x | {"more": x[FIRST].clone()})], LAST),
    ("weights have another shape", [_weights(lambda x: x | {FIRST: x[FIRST][:-1].clone()})], LAST),
    ("weights have NaN", [_weights(lambda x: x | {FIRST: x[FIRST] * float("nan")})], LAST),
    ("the optimizer is missing", [without(OPTIMIZER)], LAST),
    ("the optimizer is cut", [cut(OPTIMIZER)], LAST),
    ("the optimizer is empty", [file(OPTIMIZER, "")], LAST),
    ("the optimizer is binary", [file(OPTIMIZER, BINARY)], LAST),
    ("the optimizer is a program", [_pickled], LAST),
    ("the random states are missing", [without(RANDOM)], LAST),
    ("the random states are cut", [cut(RANDOM)], LAST),
    ("the random states are empty", [file(RANDOM, "")], LAST),
    ("the random states are binary", [file(RANDOM, BINARY)], LAST),
    ("the place in the data is missing", [without(PLACE)], LAST),
    ("the place in the data is cut", [cut(PLACE)], LAST),
    ("the place in the data is empty", [file(PLACE, "")], LAST),
    ("the place in the data is null", [file(PLACE, "null")], LAST),
    ("the place in the data is a list", [file(PLACE, "[]")], LAST),
    ("the place in the data is binary", [file(PLACE, BINARY)], LAST),
    ("the place in the data is deep", [file(PLACE, DEEP)], LAST),
    ("the place in the data has nothing", [file(PLACE, "{}")], LAST),
    ("the place in the data is beyond the text", [_place(offset=10**9)], LAST),
    ("the place in the data is negative", [_place(epoch=-1)], LAST),
    ("the place in the data is text", [_place(epoch="first")], LAST),
    ("the checkpoint is empty", [_gone(LAST), lambda x: (x / LAST).mkdir()], LAST),
    ("the checkpoint is a file", [_gone(LAST), file(LAST, "")], LAST),
    ("a checkpoint with another name",
     [lambda x: (x / "checkpoints/step-last").mkdir()], "step-last"),
    ("checkpoints are a file", [_gone("checkpoints"), file("checkpoints", "")], "checkpoints"),
    ("config.yaml is missing", [without("config.yaml")], "config.yaml"),
    ("config.yaml is empty", [file("config.yaml", "")], "config.yaml"),
    ("config.yaml is cut", [cut("config.yaml")], "config"),
    ("config.yaml is binary", [file("config.yaml", BINARY)], "config.yaml"),
    ("config.yaml is a list", [file("config.yaml", "- a\n")], "config.yaml"),
    ("config.yaml is deep", [file("config.yaml", DEEP)], "config.yaml"),
]  # fmt: skip
# what a run goes on without
LOGS = [
    ("log.jsonl is binary", [file("log.jsonl", BINARY)]),
    ("log.jsonl has a line that is no step", [file("log.jsonl", '{"loss": 1}\n')]),
    ("log.jsonl has a line that is null", [file("log.jsonl", "null\n")]),
]
CACHES = [
    ("the cache is empty", [_cached(b"")]),
    ("the cache is cut", [_cached(share=0.5)]),
    ("the cache is binary", [_cached(BINARY)]),
    ("the cache has no tokens", [_cached_tensors(
        lambda x: {"log_probabilities": x["log_probabilities"]})]),
    ("the cache has fewer of them", [_cached_tensors(
        lambda x: {k: v[:, :2].contiguous() for k, v in x.items()})]),
    ("the cache has fewer rows", [_cached_tensors(
        lambda x: {k: v[:2].contiguous() for k, v in x.items()})]),
    ("the cache has tokens beyond all", [_cached_tensors(
        lambda x: x | {"tokens": x["tokens"] + 10**6})]),
    ("the cache has negative tokens", [_cached_tensors(
        lambda x: x | {"tokens": x["tokens"] - 10**6})]),
    ("the cache has NaN", [_cached_tensors(
        lambda x: x | {"log_probabilities": x["log_probabilities"] * float("nan")})]),
    ("the cache has numbers of another kind", [_cached_tensors(
        lambda x: x | {"tokens": x["tokens"].float()})]),
]  # fmt: skip
CHANGED = [
    ("another seed", "seed=1", "seed"),
    ("another rate", "distill.optimizer.lr=0.1", "lr"),
    ("steps of another size", "batch.accumulation=2", "batch.accumulation"),
    ("another teacher", "teacher={rnn}", "teacher"),
    ("another student", "student={hybrid}", "student"),
    ("no resume", "resume=false", "resume"),
]

CASES: list[Case] = [
    *(refused(RESUME, says, make=_run(*changes), name=f"resume: {name}")
      for name, changes, says in REFUSED),
    *(refused(f"{OTHER} {words}", says, make=_run(), name=f"resume: {name}")
      for name, words, says in CHANGED),
    refused("uptrain --config {run}/none.yaml out={run}", "none.yaml", make=_run(),
            name="resume: no config"),
    refused(RESUME, "finished", name="resume: a finished run",
            make=_run(lambda x: (x / "final").mkdir())),
    refused(RESUME, "finished", name="resume: a result that is a file",
            make=_run(file("final", ""))),
    refused("diagnose {run}/final --text {text} --to 64", "config.yaml",
            make=lambda here, common: [shutil.copytree(common / "rnn", here / "run/final"),
                                       put(here / "run/config.yaml", "data: 7\n")],
            name="diagnose: a run's config that is damaged"),
    refused("diagnose {run}/final --text {text} --to 64", "config.yaml",
            make=lambda here, common: [shutil.copytree(common / "rnn", here / "run/final"),
                                       put(here / "run/config.yaml", BINARY)],
            name="diagnose: a run's config that is binary"),
    *(accepted(RESUME, "the log is for people: what is no line of it is left out",
               make=_run(*changes), name=f"resume: {name}") for name, changes in LOGS),
    *(accepted(RESUME, "the teacher says it again", make=_run(*changes), name=f"resume: {name}")
      for name, changes in CACHES),
    accepted(RESUME, "it goes on", make=_run(), name="resume: a run in order"),
    accepted(RESUME, "a killed process leaves half a line", make=_run(
        lambda x: put(x / "log.jsonl", (x / "log.jsonl").read_bytes() + b'{"step": 3, "lo')),
        name="resume: a log that is cut"),
    accepted(RESUME, "a killed process leaves a folder that it wrote in", make=_run(
        lambda x: put(x / "checkpoints/.step-00000003.partial/model.safetensors", "")),
        name="resume: what a killed process left"),
    accepted(RESUME, "the teacher says it again", make=_run(_gone("cache")),
             name="resume: no cache"),
    accepted(RESUME, "the log is made anew", make=_run(without("log.jsonl")),
             name="resume: no log"),
]  # fmt: skip
