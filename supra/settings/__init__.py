"""What a user may set: YAML text, typed models, and mistakes said in one line.

This room knows nothing of training and of mixers, which both use it.
"""
