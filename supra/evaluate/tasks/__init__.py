"""Recall tasks with prompts that are made up from a seed."""
