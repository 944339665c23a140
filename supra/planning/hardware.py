"""The machines of a run: their memory, and what they do and cost."""

import math
import re
from dataclasses import dataclass

from supra.errors import UserError, check_whole, shown

GPUS = re.compile(r"(\d{1,6})x(\d{1,6})GB", re.IGNORECASE)
GB = 10**9
LAUNCHES = ("one_gpu", "ddp", "fsdp", "hsdp")  # files of recipes/launch/
SHARDED = ("fsdp", "hsdp")  # those that split the student


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one machine, and the memory of each."""

    count: int
    gigabytes: int


@dataclass(frozen=True)
class Hardware:
    """`nodes` machines with the same GPUs; `launch` is the name of the file for
    `accelerate launch`, and `cp_size` processes have a part of each row."""

    gpus: Gpus
    nodes: int = 1
    launch: str = "ddp"
    cp_size: int = 1

    def __post_init__(self):
        if self.launch == "one_gpu" and self.processes > 1:
            raise UserError(
                f"--launch (=one_gpu) is for one GPU, and there are {self.processes}: take ddp or "
                "fsdp, or --gpus 1x80GB"
            )
        if self.launch == "hsdp" and self.gpus.count == 1:
            raise UserError(
                "--launch (=hsdp) splits the student over the GPUs of a machine, and a machine has "
                "one: take ddp or fsdp, or machines with more GPUs"
            )
        if self.processes % self.cp_size:
            raise UserError(
                f"--cp-size (={self.cp_size}) GPUs share each row, so it must divide the number of "
                f"GPUs (={self.processes})"
            )

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return self.gpus.count * self.nodes

    @property
    def readers(self) -> int:
        """Groups of processes that read different rows."""
        return self.processes // self.cp_size

    @property
    def shards(self) -> int:
        """Processes that share one copy of the student: under hsdp those of a machine."""
        return {"fsdp": self.processes, "hsdp": self.gpus.count}.get(self.launch, 1)

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return self.gpus.gigabytes * GB


@dataclass(frozen=True)
class Rate:
    """What a GPU does and costs.

    tflops: its peak in bf16, in 10^12 FLOPs a second. mfu: the share of it that a run reaches.
    price: of an hour; None where none is given.
    """

    tflops: float = 312.0
    mfu: float = 0.3
    price: float | None = None

    def __post_init__(self):
        for name, value in (("--tflops", self.tflops), ("--price", self.price)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} (={value}) must be a number above 0")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu (={self.mfu}) must be above 0 and at most 1")


def parse_gpus(option: str, text: str) -> Gpus:
    """The GPUs of `8x80GB`. Raises UserError."""
    found = GPUS.fullmatch(text)
    if found is None:
        raise UserError(f"{option} (={shown(text)}) must be NUMBERxSIZEGB, such as 8x80GB")
    count, gigabytes = map(int, found.groups())
    check_whole(f"{option}, the number of GPUs", count, 1)
    check_whole(f"{option}, the GB of a GPU", gigabytes, 1)
    return Gpus(count, gigabytes)
