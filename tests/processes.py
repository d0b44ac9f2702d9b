"""Processes of tests: forked from one that has the imports, which take longer than most of what is tested."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.multiprocessing import start_processes

import transformers_nextflow


CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["cli", "pipelines", "trainers.diffusion.diffusion_trainer", "trainers.rl.grpo_trainer"]
CONTEXT.set_forkserver_preload([__name__, "peft", *(f"transformers_nextflow.{name}" for name in PRELOADED)])
FSDP2 = Path(transformers_nextflow.__file__).parent / "recipes" / "accelerate" / "fsdp2.yaml"


def in_processes(count: int, function: Callable, *args):
    """Call `function(rank, *args)` in so many processes, and raise what one of them raises."""
    start_processes(_begin, (function, *args), nprocs=count, start_method="forkserver")


def _begin(rank: int, function: Callable, *args):
    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    function(rank, *args)


def in_two_processes(function: Callable, *args):
    in_processes(2, function, *args)


def on_other_devices():
    """Tell accelerate so: processes on CPUs it takes for ones that hold whole weights, without a word."""

    def set_device(state: PartialState):
        state.device, state.distributed_type = torch.device("cpu"), DistributedType.MULTI_GPU

    PartialState.set_device = set_device


def join_sharded(rank: int, port: int, processes: int = 2, *options: str):
    """Become one of some CPU processes that `accelerate launch --config_file fsdp2.yaml` starts, in float32 unless the
    command line's `options` say otherwise.
    """
    given = ["--config_file", str(FSDP2), "--num_processes", str(processes), "--mixed_precision", "no", *options]
    os.environ |= prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args([*given, "-"]))[0])
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    on_other_devices()
