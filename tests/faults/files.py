"""Files of a checkpoint beside its config.json: weights and their index, tokenizer, cards, GGUF."""

import json
import struct
from itertools import cycle
from pathlib import Path

from tests.faults.case import (
    BINARY,
    DEEP,
    Case,
    Make,
    accepted,
    copied,
    cut,
    fields,
    file,
    put,
    refused,
    without,
)
from tests.faults.configs import (
    CONVERT,
    DIAGNOSE,
    EVAL,
    GENERATE,
    INSPECT,
    STUDENT,
    TASK,
    TEACHER,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = "model-00002-of-00004.safetensors"
CARD, REPORT = "README.md", "conversion.json"
POINTER = "version https://git-lfs.github.com/spec/v1\n"
ALL = (CONVERT, EVAL, GENERATE, TASK, TEACHER, DIAGNOSE)


def tensors(change) -> "callable":
    """A change: the tensors by name, as `change` leaves them."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / SINGLE)
        change(found)
        save_file({k: x.contiguous() for k, x in found.items()}, folder / SINGLE, {"format": "pt"})

    return apply


def _replace(name: str, make) -> "callable":
    return tensors(lambda found: found.update({name: make(found[name])}))


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


def _index(content) -> "callable":
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return file(INDEX, text)


def _mapped(name: str) -> "callable":
    """A change: the index says that one tensor is in that file."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][HEAD] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _linked(name: str, target: str) -> "callable":
    """A change: the file is a link out of the folder."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _split(folder: Path) -> None:
    """A change: the weights in several files and their index, as of a source that is large."""
    from safetensors.torch import load_file, save_file

    found = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(found)
    parts = [names[number::4] for number in range(4)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-00004.safetensors"
        save_file({name: found[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    put(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def _flipped(name: str) -> "callable":
    """A change: one bit in the middle of the data."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0x40
        (folder / name).write_bytes(content)

    return change


def _header(size: int, text: str) -> bytes:
    return struct.pack("<Q", size) + text.encode()


# what is wrong with the weights of a source, changes to the folder, what the line names
WEIGHTS = [
    ("no weights", [without(SINGLE)], "safetensors"),
    ("weights are empty", [file(SINGLE, "")], SINGLE),
    ("weights are binary", [file(SINGLE, BINARY)], SINGLE),
    ("weights are text", [file(SINGLE, POINTER * 3)], SINGLE),
    ("weights are cut in half", [cut(SINGLE)], SINGLE),
    ("weights lack the last bytes", [cut(SINGLE, 0.999)], SINGLE),
    ("a header beyond the file", [file(SINGLE, _header(2**62, "{}"))], SINGLE),
    ("a header that is no JSON", [file(SINGLE, _header(8, "{not it}"))], SINGLE),
    ("a header that is null", [file(SINGLE, _header(4, "null"))], SINGLE),
    ("a header without tensors", [file(SINGLE, _header(2, "{}"))], "missing"),
    ("a header that is deep", [file(SINGLE, _header(len(DEEP), DEEP))], SINGLE),
    ("a tensor is missing", [tensors(lambda x: x.pop(NORM))], NORM),
    ("all layers are missing", [tensors(lambda x: [x.pop(k) for k in [*x] if ".1." in k])],
     "layers.1."),
    ("a tensor has another shape", [_replace(NORM, lambda x: x[:-1])], NORM),
    ("a tensor has one dimension more", [_replace(NORM, lambda x: x[None])], NORM),
    ("a tensor is a scalar", [_replace(NORM, lambda x: x.sum())], NORM),
    ("a tensor is empty", [_replace(NORM, lambda x: x[:0])], NORM),
    ("a tensor is bool", [_replace(NORM, lambda x: x > 0)], NORM),
    ("a tensor is int64", [_replace(NORM, lambda x: x.long())], NORM),
    ("a tensor is uint8", [_replace(EMBEDDING, lambda x: x.byte())], EMBEDDING),
    ("a tensor has NaN", [_replace(NORM, lambda x: x * float("nan"))], NORM),
    ("a tensor has one inf", [_replace(NORM, lambda x: x.clone().index_fill_(
        0, x.argmax(), float("inf")))], NORM),
    ("a folder in the place of weights", [without(SINGLE), lambda x: (x / SINGLE).mkdir()],
     "safetensors"),
    ("pickled weights alone", [without(SINGLE), file("pytorch_model.bin", BINARY)], "safetensors"),
    ("weights link to nothing", [_linked(SINGLE, "none.safetensors")], "safetensors"),
    ("weights link out of the folder", [_linked(SINGLE, "/etc/passwd")], SINGLE),
    ("a shard is missing", [_split, without(SHARD)], SHARD),
    ("a shard is cut", [_split, cut(SHARD)], SHARD),
    ("a shard is empty", [_split, file(SHARD, "")], SHARD),
    ("a shard is binary", [_split, file(SHARD, BINARY)], SHARD),
    ("a shard is a folder", [_split, without(SHARD), lambda x: (x / SHARD).mkdir()], SHARD),
    ("the index is empty", [_split, _index("")], INDEX),
    ("the index is binary", [_split, _index(BINARY)], INDEX),
    ("the index is null", [_split, _index("null")], INDEX),
    ("the index is a list", [_split, _index("[]")], INDEX),
    ("the index is deep", [_split, _index(DEEP)], INDEX),
    ("the index has no weight_map", [_split, _index({"metadata": {}})], INDEX),
    ("the weight_map is null", [_split, _index({"weight_map": None})], INDEX),
    ("the weight_map is a list", [_split, _index({"weight_map": [HEAD]})], INDEX),
    ("the weight_map is empty", [_split, _index({"weight_map": {}})], INDEX),
    ("the weight_map has numbers", [_split, _index({"weight_map": {HEAD: 7}})], INDEX),
    ("the index names null", [_split, _mapped(None)], INDEX),
    ("the index names a list", [_split, _mapped([SHARD])], INDEX),
    ("the index names nothing", [_split, _mapped("")], INDEX),
    ("the index names the folder", [_split, _mapped(".")], INDEX),
    ("the index names a file above", [_split, _mapped("../file.safetensors")], "../file"),
    ("the index names an absolute file", [_split, _mapped("/etc/passwd")], "/etc/passwd"),
    ("the index names a file that is not there", [_split, _mapped("none.safetensors")], "none"),
    ("the index names a text", [_split, _mapped("config.json")], "config.json"),
    ("the index names a pickle", [_split, file("pytorch_model.bin", BINARY),
                                  _mapped("pytorch_model.bin")], "pytorch_model.bin"),
    ("the index is cut", [_split, cut(INDEX)], INDEX),
]  # fmt: skip
TOKENIZER, SETTINGS, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
CODE = "a tokenizer that is code"
# of a tokenizer, which conversion copies and the other commands read
TOKENIZERS = [
    ("no tokenizer", [without(TOKENIZER), without(SETTINGS)], "tokenizer"),
    ("tokenizer.json is missing", [without(TOKENIZER)], "tokenizer"),
    ("tokenizer.json is empty", [file(TOKENIZER, "")], "tokenizer"),
    ("tokenizer.json is cut", [cut(TOKENIZER)], "tokenizer"),
    ("tokenizer.json is binary", [file(TOKENIZER, BINARY)], "tokenizer"),
    ("tokenizer.json is null", [file(TOKENIZER, "null")], "tokenizer"),
    ("tokenizer.json is a list", [file(TOKENIZER, "[]")], "tokenizer"),
    ("tokenizer.json is an empty object", [file(TOKENIZER, "{}")], "tokenizer"),
    ("tokenizer.json is deep", [file(TOKENIZER, DEEP)], "tokenizer"),
    ("an unknown kind of tokenizer", [fields({"model.type": "magic"}, TOKENIZER)], "tokenizer"),
    ("merges are numbers", [fields({"model.merges": [1, 2]}, TOKENIZER)], "tokenizer"),
    ("a merge of unknown words", [fields({"model.merges": [["qq", "zz"]]}, TOKENIZER)],
     "tokenizer"),
    ("a vocabulary of null", [fields({"model.vocab": None}, TOKENIZER)], "tokenizer"),
    ("tokens beyond the model's", [fields({"model.vocab.river": 5000}, TOKENIZER),
                                   fields({"model.vocab.t": 4999}, TOKENIZER)], "5000"),
    ("tokenizer_config.json is cut", [cut(SETTINGS)], "tokenizer"),
    ("tokenizer_config.json is binary", [file(SETTINGS, BINARY)], "tokenizer"),
    ("tokenizer_config.json is null", [file(SETTINGS, "null")], "tokenizer"),
    ("tokenizer_config.json is a list", [file(SETTINGS, "[1]")], "tokenizer"),
    ("an end token of the wrong kind", [fields({"eos_token": 7}, SETTINGS)], "tokenizer"),
    ("an end token that is a list", [fields({"eos_token": ["a"]}, SETTINGS)], "tokenizer"),
    ("a class of tokenizer that is null", [fields({"tokenizer_class": 7}, SETTINGS)], "tokenizer"),
    (CODE, [fields({"auto_map": {"AutoTokenizer": ["magic.Tokenizer", None]},
                    "tokenizer_class": "MagicTokenizer"}, SETTINGS),
            file("magic.py", "raise SystemExit(0)\n")], "code"),
]  # fmt: skip
NO_END = [fields({"eos_token": None}, SETTINGS)]
TEMPLATES = [
    ("no Jinja", "{% for"),
    ("an unknown filter", "{{ messages | magic }}"),
    ("an unknown field", "{{ messages[0].a.b.c }}"),
    ("that raises", "{{ raise_exception('no') }}"),
    ("that divides by zero", "{{ 1 / 0 }}"),
    ("that is empty", "{{ '' }}"),
    ("that is a number", 7),
    ("that is a mapping of nothing", {}),
    ("that reaches for the system", "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}"),
    ("without an end", "{% for i in range(999999999999) %}a{% endfor %}"),
]
GENERATIONS = [
    ("is cut", '{"temperature": '),
    ("is binary", BINARY),
    ("is null", "null"),
    ("is a list", "[]"),
    ("has an end that is text", '{"eos_token_id": "end"}'),
    ("has ends that are text", '{"eos_token_id": [0, "end"]}'),
    ("has a cache of magic", '{"cache_implementation": "magic"}'),
]
OVERRULED = [
    ("has a temperature that is text", '{"temperature": "hot", "do_sample": true}'),
    ("has a negative temperature", '{"temperature": -1.0, "do_sample": true}'),
    ("has no beams", '{"num_beams": 0}'),
    ("names code on the hub", '{"custom_generate": "nobody/magic"}'),
]
CARDS = [
    ("front matter that is no YAML", "---\nlicense: [a\n---\ntext\n"),
    ("binary", BINARY),
    ("empty", ""),
    ("front matter alone", "---\nlicense: mit"),
    ("front matter that is a list", "---\n- a\n---\n"),
    ("front matter with a date", "---\nlicense: 2001-01-01\n---\n"),
    ("front matter with a mapping", "---\nlicense: {a: {b: [1]}}\n---\n"),
    ("a license of two lines", '---\nlicense: "mit\\n---\\nbase_model: x"\n---\n'),
    ("UTF-16", "---\nlicense: mit\n---\n".encode("utf-16")),
    ("python in YAML", "---\nlicense: !!python/object/apply:os.system [exit]\n---\n"),
    ("tabs", "---\n\tlicense: mit\n---\n"),
    ("a bomb of aliases", "---\na: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(22))
     + "license: *w\n---\n"),
]  # fmt: skip


def _weight_cases() -> list[Case]:
    """Each in a conversion, and in one of the other commands, in turn."""
    found, others = [], cycle(ALL[1:5])
    for name, changes, says in WEIGHTS:
        for command in (CONVERT, next(others)):
            full = f"{command.split()[0]}: {name}"
            found.append(refused(command, says, make=copied("base", *changes), name=full))
    for name, changes, says in WEIGHTS[:12]:
        command = next(others)
        found.append(
            refused(command, says, make=copied("rnn", *changes), name=f"rnn: {name}")
            if command != TEACHER
            else refused(STUDENT, says, make=copied("rnn", *changes), name=f"rnn: {name}")
        )
    return found


def _tokenizer_cases() -> list[Case]:
    commands = cycle((EVAL, GENERATE, TASK, DIAGNOSE, STUDENT))
    found = []
    for name, changes, says in TOKENIZERS:
        found.append(refused(next(commands), says, make=copied("rnn", *changes), name=name))
        if name not in ("no tokenizer", CODE):
            found.append(refused(CONVERT, says, make=copied("base", *changes),
                                 name=f"convert: {name}"))  # fmt: skip
    for command in (EVAL, DIAGNOSE, STUDENT):
        name = f"{command.split()[0]}: a tokenizer without an end token"
        found.append(refused(command, "eos_token", make=copied("rnn", *NO_END), name=name))
    return found


def _template_cases() -> list[Case]:
    return [
        refused(
            GENERATE + " --chat",
            "chat template",
            make=copied("rnn", fields({"chat_template": template}, SETTINGS)),
            name=f"a chat template {name}",
        )
        for name, template in TEMPLATES
    ]


def _card_cases() -> list[Case]:
    """Of a source; and of the converted model, when its training ends."""
    reason = "a card is words for people: the model is made without what it cannot say"
    return [
        *(accepted(CONVERT, reason, make=copied("base", file(CARD, content)),
                   name=f"a card that is {name}") for name, content in CARDS),
        *(accepted(STUDENT, reason, make=copied("rnn", file(CARD, content)),
                   name=f"training a model with a card that is {name}")
          for name, content in CARDS[:4]),
    ]  # fmt: skip


def _gguf(change=lambda content: content) -> Make:
    """{file}.gguf: the shared GGUF file, changed."""

    def make(here: Path, common: Path) -> None:
        put(here / "file.gguf", change((common / "model.gguf").read_bytes()))

    return make


def _swap(old: bytes, new: bytes):
    assert len(old) == len(new)
    return lambda content: content.replace(old, new)


GGUFS = [
    ("is empty", lambda x: b""),
    ("is binary", lambda x: BINARY),
    ("has another magic", lambda x: b"GGML" + x[4:]),
    ("has version 99", lambda x: x[:4] + struct.pack("<I", 99) + x[8:]),
    ("is cut in its header", lambda x: x[:200]),
    ("is cut in its names", lambda x: x[:8000]),
    ("is cut in its tensors", lambda x: x[: len(x) // 2]),
    ("lacks the last bytes", lambda x: x[:-1000]),
    ("has no tensors", lambda x: x[:8] + struct.pack("<Q", 0) + x[16:]),
    ("has 2**60 tensors", lambda x: x[:8] + struct.pack("<Q", 2**60) + x[16:]),
    ("has 2**60 fields", lambda x: x[:16] + struct.pack("<Q", 2**60) + x[24:]),
    ("has no fields", lambda x: x[:16] + struct.pack("<Q", 0) + x[24:]),
    ("has an unknown architecture", _swap(b"llama", b"magic")),
    ("names a tensor otherwise", _swap(b"output_norm.weight", b"output_nurm.weight")),
    ("is the text of a pointer", lambda x: POINTER.encode()),
]
NO_TOKENS = _swap(b"tokenizer.ggml.tokens", b"tokenizer.ggml.takens")
GGUF_COMMANDS = [
    command.replace("{model}", "{file}.gguf") for command in (CONVERT, INSPECT, EVAL, TASK)
]


def _gguf_cases() -> list[Case]:
    commands = cycle(GGUF_COMMANDS[1:])
    return [
        refused(command, "file.gguf", make=_gguf(change),
                name=f"{command.split()[0]}: a GGUF file that {name}")
        for name, change in GGUFS
        for command in (GGUF_COMMANDS[0], next(commands))
    ]  # fmt: skip


CASES = [
    *_weight_cases(),
    *_tokenizer_cases(),
    *_template_cases(),
    *_card_cases(),
    *(refused(GENERATE, ("generation_config", "cache_implementation"),
              make=copied("rnn", file(GENERATION, content)),
              name=f"generation_config.json {name}") for name, content in GENERATIONS),
    *_gguf_cases(),
    refused(CONVERT, HEAD, name="convert: the index names another shard",
            make=copied("base", _split, _mapped(SHARD))),
    accepted(GENERATE, "all shards are read, and the tensor is found where it is",
             make=copied("base", _split, _mapped(SHARD)),
             name="generate: the index names another shard"),
    accepted(EVAL, "tokenizer.json says all that its class would",
             make=copied("rnn", fields({"tokenizer_class": "MagicTokenizer"}, SETTINGS)),
             name="an unknown class of tokenizer"),
    *(accepted(GENERATE, "temperature and beams are those of the command",
               make=copied("rnn", file(GENERATION, content)),
               name=f"generation_config.json {name}") for name, content in OVERRULED),
    *(refused(command, "file.gguf", make=_gguf(NO_TOKENS), name=f"{command.split()[0]}: a GGUF "
              "file that has no tokens") for command in (GGUF_COMMANDS[0], GGUF_COMMANDS[2])),
    accepted(GGUF_COMMANDS[1], "its words are not read", make=_gguf(NO_TOKENS),
             name="inspect: a GGUF file that has no tokens"),
    accepted(GGUF_COMMANDS[0], "it is in order", make=_gguf(), name="a GGUF file"),
    refused("inspect {here}/link", "link", make=lambda here, _: (here / "link").symlink_to("link"),
            name="a link to itself"),
    refused(CONVERT, "config.json", name="config.json is a folder",
            make=copied("base", without("config.json"), lambda x: (x / "config.json").mkdir())),
    accepted(CONVERT, "a folder is not a licence, and a model needs no licence",
             make=copied("base", lambda x: (x / "LICENSE").mkdir()), name="a licence: a folder"),
    accepted(EVAL, "the single file counts, as for transformers",
             make=copied("base", _index("{")), name="eval: a single file and a broken index"),
    accepted(CONVERT, "the single file counts, as for transformers",
             make=copied("base", _index("{")), name="convert: a single file and a broken index"),
    accepted(STUDENT, "what a conversion was is for people to read",
             make=copied("rnn", file(REPORT, BINARY)), name="uptrain: conversion.json is binary"),
    accepted(CONVERT, "a link out of the folder is left out, and a model needs no licence",
             make=copied("base", _linked("LICENSE.txt", "/etc/passwd")),
             name="a licence that links out of the folder"),
    accepted(CONVERT, "its code is left behind with a line, and tokenizer.json says all",
             make=copied("base", *next(changes for name, changes, _ in TOKENIZERS if name == CODE)),
             name=f"convert: {CODE}"),
    accepted(CONVERT, "a model without a tokenizer says so, and is converted",
             make=copied("base", without(TOKENIZER), without(SETTINGS)),
             name="convert: no tokenizer"),
    accepted(GENERATE, "beams, temperature and length come from the command",
             make=copied("rnn", without(GENERATION)), name="no generation_config.json"),
    accepted(CONVERT, "a source's code is not copied",
             make=copied("base", file("tokenizer_magic.py", "raise SystemExit(1)\n")),
             name="code beside the tokenizer"),
    accepted(INSPECT, "what a conversion was is for people to read",
             make=copied("rnn", file(REPORT, "{")), name="inspect: conversion.json is cut"),
    accepted(EVAL, "what a conversion was is for people to read",
             make=copied("rnn", file(REPORT, BINARY)), name="eval: conversion.json is binary"),
    accepted(STUDENT, "what a conversion was is for people to read",
             make=copied("rnn", file(REPORT, "null")), name="uptrain: conversion.json is null"),
    accepted(STUDENT, "what a conversion was is for people to read",
             make=copied("rnn", without(REPORT)), name="uptrain: no conversion.json"),
    refused(EVAL, "code of the checkpoint", name="a converted model that names code",
            make=copied("rnn", fields({"model_type": "magic", "auto_map":
                {"AutoConfig": "magic.Config", "AutoModelForCausalLM": "magic.Model"}}),
                file("magic.py", "raise SystemExit(0)\n"))),
    accepted(CONVERT, "a flipped bit is another number: supra inspect --verify compares a "
             "conversion's own with its checksums", make=copied("base", _flipped(SINGLE)),
             name="a flipped bit in a source"),
    accepted(INSPECT, "weights are not read", make=copied("rnn", without(SINGLE)),
             name="inspect: no weights"),
    refused(INSPECT + " --verify", NORM, name="inspect --verify: a changed tensor",
            make=copied("rnn", _replace(NORM, lambda x: x + 1))),
    refused(INSPECT + " --verify", "safetensors", name="inspect --verify: no weights",
            make=copied("rnn", without(SINGLE))),
    refused(INSPECT + " --verify", REPORT, name="inspect --verify: conversion.json is cut",
            make=copied("rnn", file(REPORT, "{"))),
    refused(INSPECT + " --verify", REPORT, name="inspect --verify: no conversion.json",
            make=copied("rnn", without(REPORT))),
    refused(CONVERT, "tie_word_embeddings", make=copied("base", fields(
        {"tie_word_embeddings": True})), name="tied in the config and not in the weights"),
]  # fmt: skip
