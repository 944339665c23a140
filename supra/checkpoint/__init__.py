"""Checkpoints on the disk: opened without running their code, checked, and written whole."""
