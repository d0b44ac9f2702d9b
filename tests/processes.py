"""Processes of tests: forked from one that has the imports, which take longer than most of what is tested."""

import multiprocessing
from collections.abc import Callable

from torch.multiprocessing import start_processes


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusers", "peft", "trl", "transformers_nextflow.trainers"])


def in_two_processes(function: Callable, *args):
    """Call `function(rank, *args)` in two processes, and raise what one of them raises."""
    start_processes(function, args, nprocs=2, start_method="forkserver")
