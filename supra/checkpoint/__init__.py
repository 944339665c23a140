"""Checkpoints on disk: opened without running their code, checked, and written completely."""
