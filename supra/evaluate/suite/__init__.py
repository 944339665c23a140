"""A student beside its teacher on tasks that it was not trained for."""
