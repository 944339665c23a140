"""What a model consists of: layers, parameters, and the size of its state."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.conversion_report import describe_layers
from supra.conversion.plan import check_family
from supra.errors import UserError
from supra.export.converted import KEPT
from supra.export.gguf import rwkv6qwen2
from supra.export.targets import TARGETS
from supra.mixers import NEW_PARAMETERS
from supra.model.state_size import state_bytes


@dataclass(frozen=True)
class Inspection:
    """`parameters` count values; `state_bytes` has the bytes of one sequence by context length;
    `exports` has what keeps a converted model out of each target of `supra export`."""

    family: str
    layers: list[str]
    options: dict[str, dict[str, Any]]
    parameters: int
    new_parameters: int
    state_bytes: dict[int, int]
    exports: dict[str, list[str]] = field(default_factory=dict)
    verified: int | None = None  # tensors whose checksums match

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return vars(self)

    def lines(self) -> list[str]:
        """The fields for a terminal."""
        lines = [
            f"family:     {self.family}",
            f"layers:     {describe_layers(self.layers)}",
            f"parameters: {self.parameters:,} ({self.new_parameters:,} new)",
        ]
        for name, options in self.options.items():
            if options:
                listed = ", ".join(f"{key}={value}" for key, value in options.items())
                lines.append(f"{name + ':':<11} {listed}")
        for context, size in self.state_bytes.items():
            lines.append(f"state:      {size:,} bytes per sequence at {context:,} tokens")
        for target, obstacles in self.exports.items():
            alone = {KEPT, rwkv6qwen2.MIXER}.isdisjoint(self.layers)
            way = " with --idle-attention" if alone and not obstacles else ""
            lines.append(f"export:     {'not ' if obstacles else ''}to {target}{way}")
            lines += [f"            {obstacle}" for obstacle in obstacles]
        if self.verified is not None:
            lines.append(f"verified:   {self.verified:,} tensors match their checksums")
        return lines


def inspect_model(config: PreTrainedConfig, contexts: list[int]) -> Inspection:
    """Inspect a model, converted or not, without reading its weights.

    contexts: the context lengths to give the state's size for.
    Raises UserError for a family that cannot be converted, and for a context below 1.
    """
    if config.model_type != "supra":
        check_family(config)
    for context in contexts:
        if context < 1:
            raise UserError(f"context (={context}) must be at least 1 token")
    plan = getattr(config, "supra", None)
    model = meta_model(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Inspection(
        family=getattr(config, "base_model_type", config.model_type),
        layers=plan["layers"] if plan else ["attention"] * config.num_hidden_layers,
        options=plan["options"] if plan else {},
        parameters=sum(sizes.values()),
        new_parameters=sum(size for name, size in sizes.items() if NEW_PARAMETERS in name),
        state_bytes={context: state_bytes(config, context) for context in contexts},
        exports={name: target.obstacles(config) for name, target in TARGETS.items() if plan},
    )
