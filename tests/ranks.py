"""Runs a function on several CPU ranks, which are forks of this process if nothing else is said."""

import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(function, ranks, folder, *arguments, start_method="fork"):
    """Call function(*arguments) on this many ranks of a group. Raises what a rank raises."""
    given = function, ranks, f"file://{folder}/ranks", arguments
    try:
        mp.start_processes(_rank, given, ranks, start_method=start_method)
    except mp.ProcessRaisedException as error:
        if "AssertionError" in str(error):
            raise AssertionError(str(error)) from None
        raise


def _rank(rank, function, ranks, meeting_point, arguments):
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=ranks)
    function(*arguments)
    dist.destroy_process_group()
