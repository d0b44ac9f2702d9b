"""After a kill at any moment the old or the new is there, whole."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from processes import CONTEXT
from test_code_extraction import contents, extract, make_source
from tiny import tiny_vq_config
from transformers import SiglipVisionConfig, SiglipVisionModel

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.cli import main
from transformers_nextflow.conversion.siglip2 import convert_siglip2


KILLS = 20
TASKS = {
    "save_pretrained": """
from transformers_nextflow.utils.atomic_files import atomic_save
class Saved:
    @atomic_save
    def save_pretrained(self, folder):
        for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            with open(folder + "/" + name, "w") as file:
                file.write(self.number)
                file.flush()
def work(number):
    Saved.number = number
    Saved().save_pretrained("save_pretrained")
""",
    "final": """
from transformers_nextflow.utils.atomic_files import atomic_write
def work(number):
    with atomic_write("final") as folder:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(number)
""",
    "evaluate --json": """
from transformers_nextflow.evaluation import results
results.commit = results._cpu_model = lambda: None
def work(number):
    results.write_result("evaluate --json/scores.json", {"number": number, "end": number})
""",
    "rotation": """
import shutil
from unittest import mock
from transformers_nextflow.trainers.runs.atomic_checkpoints import PARTIAL, AtomicCheckpointMixin
class Trained(AtomicCheckpointMixin):
    args = mock.Mock(save_total_limit=2)
    state = mock.Mock(best_model_checkpoint=None)
def work(number):
    run, name = Path("rotation"), f"checkpoint-{int(number) % 3 + 1}"
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
    (run / PARTIAL / name).mkdir(parents=True)
    for part in "abc":
        (run / PARTIAL / name / part).write_text(number)
    Trained()._publish(run, name)
""",
}
CONVERTER = """
def work(number):
    convert_siglip2(Path("source"), Path("target-" + number), tiny_vq_config())
"""
EXTRACTION = """
from transformers_nextflow.data import extract_codes
def work(number):
    extract_codes("rows.jsonl", "tokenizer", f"codes-{int(number) // 1000 % 4}", shard_size=1, top_k=4)
    time.sleep(60)
"""


def kill_children(folder: Path, tasks: list[str], seconds: tuple[float, float], ends: Connection):
    """Fork children of this process, kill each after so many seconds, and wait until somebody has looked."""
    os.chdir(folder)
    torch.set_num_threads(1)
    chance = random.Random(0)
    for task in tasks:
        names = dict(globals())
        exec(task, names)
        for kill in range(KILLS):
            if not (child := os.fork()):
                sys.stderr = open(os.devnull, "w")
                # Again and again, with a number that all files of one piece of work hold.
                for number in itertools.count(1000 * kill + 1000):
                    names["work"](str(number))
            time.sleep(chance.uniform(*seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ends.send("killed")
            ends.recv()


def killed(tasks: dict[str, str], folder: Path, seconds: tuple[float, float]) -> Iterator[str]:
    """Kill processes that do a task, each after so many seconds, and yield the task each time."""
    ends, others = CONTEXT.Pipe()
    process = CONTEXT.Process(target=kill_children, args=(folder, list(tasks.values()), seconds, others))
    process.start()
    for task in [name for name in tasks for _ in range(KILLS)]:
        assert ends.poll(60) and ends.recv() == "killed"
        yield task
        ends.send("seen")
    process.join()


def test_after_a_kill_the_old_or_the_new_is_whole(tmp_path):
    found: dict[str, set[str]] = {task: set() for task in TASKS}
    for task in killed(TASKS, tmp_path, (0.005, 0.08)):
        place, seen = tmp_path / task, found[task]
        folders = list(place.glob("checkpoint-*")) if task == "rotation" else [place] if place.exists() else []
        for folder in folders:
            files = [path for path in folder.iterdir() if not path.name.startswith(".")]
            contents = {path.read_text() for path in files}
            # Before the first piece of work is done there is nothing.
            assert len(contents) == 1 or not (seen or files)
            assert len(files) == (1 if task == "evaluate --json" else 3) or not seen
            assert task != "evaluate --json" or all(content.endswith("}\n") for content in contents)
            seen |= contents
    assert all(len(seen) > 1 for seen in found.values())


def test_after_a_kill_there_is_no_converted_model_or_a_whole_one(tmp_path):
    tower = tiny_vq_config().semantic_config.to_dict()
    SiglipVisionModel(SiglipVisionConfig(**tower)).save_pretrained(tmp_path / "source")
    found = set()
    for _ in killed({"": CONVERTER}, tmp_path, (0.05, 0.5)):
        for target in set(tmp_path.glob("target-????*")) - found:
            if not target.name.endswith(".partial"):
                NextFlowVQModel.from_pretrained(target)
                found.add(target)
    # A run that was killed is begun again.
    for partial in list(tmp_path.glob("target-*.partial"))[:1]:
        NextFlowVQModel.from_pretrained(convert_siglip2(tmp_path / "source", partial.with_suffix(""), tiny_vq_config()))


def test_after_kills_an_extraction_goes_on_to_the_same_codes(tmp_path):
    make_source(tmp_path)
    extract(tmp_path, "expected", shard_size=1)
    for _ in killed({"": EXTRACTION}, tmp_path, (0.02, 0.2)):
        pass
    for output in sorted(tmp_path.glob("codes-?")):
        extract(tmp_path, output.name, shard_size=1)
        assert contents(output) == contents(tmp_path / "expected")


def extract_by_command(folder: Path):
    """`extract-codes` on the command line, with what it says in a file."""
    os.chdir(folder)
    os.dup2(os.open("errors.txt", os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["transformers-nextflow", "extract-codes", "rows.jsonl", "--tokenizer", "tokenizer", "--output", "codes"]
    sys.argv += ["--shard-size", "1"]
    main()


def test_a_request_to_terminate_ends_long_work_in_one_line_that_says_what_is_kept(tmp_path):
    make_source(tmp_path, 400)
    process = CONTEXT.Process(target=extract_by_command, args=(tmp_path,))
    process.start()
    while not list(tmp_path.glob("codes/codes-*.json")):
        assert process.is_alive()
        time.sleep(0.05)
    process.terminate()
    process.join()
    errors = (tmp_path / "errors.txt").read_text()
    last = errors.strip().splitlines()[-1]
    assert process.exitcode == 128 + signal.SIGTERM
    assert last.startswith("Interrupted. ") and "of 400 shards are kept in codes" in last
    assert "Traceback" not in errors and not [name for name in os.listdir(tmp_path / "codes") if name.startswith(".")]
