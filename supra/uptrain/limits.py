"""The largest sizes that settings and options take, so that a typo does not end in hours without an
answer or out of memory.

They are above what any machine can do, so they stop no real use.
"""

TEXT = 10**15  # tokens of a text or of a run; the largest models were trained on less than 10**14
STREAM = 2**30  # tokens read one after the other; days on the fastest machine
PASS = 2**22  # tokens of one forward pass: hidden states of 1024 channels then take 16 GB
STEP = 2**26  # tokens of a step in one process; the largest runs have as many in all processes
COUNT = 10**6  # rows, measurements, new tokens
WIDTH = 2**16  # channels, ranks, heads
VOCABULARY = 2**24  # the largest public ones have 2**18 tokens
PASSKEYS = 10**5  # of five digits, which all differ
BEAMS = 2**10  # and processes, threads
SEED = 2**32 - 1  # numpy's
