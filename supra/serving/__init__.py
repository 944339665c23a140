"""Text out of a model: on the terminal and over HTTP."""
