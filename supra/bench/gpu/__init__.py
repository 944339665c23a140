"""`supra bench gpu`: one page on a GPU. Are the kernels right, and how fast are they?

Rows run one after the other in a process of their own, each with a time limit (see
supra.bench.limited). They are kept in a JSON file, so that an interrupted run continues. No row
needs a network.
"""
