"""The state of a prompt: saved, loaded and forked. See `supra.model.states`."""

from supra.model.states import fork_state, load_state, save_state

__all__ = ["fork_state", "load_state", "save_state"]
