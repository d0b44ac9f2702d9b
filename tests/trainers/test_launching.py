"""The files that launch a training on many machines: their commands are ones that accelerate and the package read."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser

from transformers_nextflow.cli import app
from transformers_nextflow.trainers.recipes import RECIPES


FOLDER = RECIPES / "launch"
ARGUMENTS = ["pretrain_256", "--model", "runs/alignment/final", "--data", "two words"]


def slurm_command(folder: Path, output: Path) -> list[str]:
    """What the second of two nodes is told to run, by the script with Slurm's commands replaced."""
    tools = {
        "scontrol": "echo first; echo second",
        "srun": 'exec "$@"',
        "accelerate": r"printf '%s\n' accelerate \"$@\"",
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n".replace(r"\"", '"'))
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "OUTPUT": str(output)}
    environment = os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", FOLDER / "slurm.sh", *ARGUMENTS], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def kubernetes_command(folder: Path, output: Path) -> list[str]:
    _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (line,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    line = line.replace("exec accelerate", r"printf '%s\n' accelerate").replace("/runs/256", str(output))
    environment = os.environ | {"JOB_COMPLETION_INDEX": "1"}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("is_begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("command", [slurm_command, kubernetes_command], ids=["slurm", "kubernetes"])
def test_the_commands_are_read_and_go_on_where_there_is_a_checkpoint(command, is_begun, tmp_path):
    output = tmp_path / "output"
    (output / "checkpoint-1" if is_begun else output).mkdir(parents=True)
    words = command(tmp_path, output)
    assert words[:2] == ["accelerate", "launch"]
    launch = launch_command_parser().parse_args(words[2:])
    assert launch.num_processes == 8 * launch.num_machines and launch.machine_rank == 1 and launch.main_process_ip
    assert (RECIPES.parent / launch.config_file).is_file()
    assert launch.module and launch.training_script == "transformers_nextflow.cli"
    name, *arguments = launch.training_script_args
    train = typer.main.get_command(app).commands[name]
    read = train.make_context(name, list(arguments)).params
    assert read["recipe"] == "pretrain_256" and read["resume"] == is_begun
    assert read["output"] == output
    if command is slurm_command:
        assert read["data"] == "two words"


def test_the_pages_name_the_private_methods_of_trl_that_are_overridden():
    trl = pytest.importorskip("trl")
    from transformers import Trainer

    from transformers_nextflow.trainers import NextFlowGRPOTrainer

    own = {
        name
        for name in vars(NextFlowGRPOTrainer)
        if re.match("_[a-z]", name) and callable(getattr(trl.GRPOTrainer, name, None))
    }
    page = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()
    assert own == set(re.findall(r"^\| `(_\w+)` \|", page, re.MULTILINE))
    assert hasattr(Trainer, "_get_train_sampler")
