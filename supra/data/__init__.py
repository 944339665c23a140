"""Text and synthetic languages, tokenized and packed into rows."""
