"""The second way to load a checkpoint: `trust_remote_code=True`, without importing supra."""

from pathlib import Path

SHIM = '''\
"""Loads this checkpoint through the installed package supra; holds no model code of its own."""

try:
    from supra.configuration import SupraConfig
    from supra.modeling import SupraForCausalLM, SupraModel
except ImportError as error:
    raise ImportError(
        "This checkpoint is a recurrent model. It needs the package supra-rnn, which is not "
        "installed: pip install supra-rnn, then load the checkpoint again. "
        "The package named supra on PyPI is another project."
    ) from error

__all__ = ["SupraConfig", "SupraForCausalLM", "SupraModel"]
'''


def write_shim(folder: Path) -> None:
    """Write the module that config.json's auto_map names into a checkpoint."""
    (folder / "modeling_supra.py").write_text(SHIM)
