"""The converted model: the base family's own classes, with a mixer in every attention module."""
