"""What a run will need, before anything is loaded: parameters, memory, tokens, FLOPs, hours, money.

`plan(config, …)` in plan.py puts it together. The arithmetic is in parameters.py, memory.py and
compute.py; activations.py counts what autograd keeps.
"""
