"""Documents to pack."""

from supra.data.packing import Document


def whole(texts, start=()):
    """Documents of these tokens that are trained on as a whole."""
    return (Document(tokens, tokens, start) for tokens in texts)
