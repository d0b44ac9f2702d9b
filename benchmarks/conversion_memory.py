"""Measure the peak memory of converting Qwen2.5-VL-7B, with a new vision tokenizer of full size.

    python benchmarks/conversion_memory.py --folder /tmp/conversion-memory

The source is a stand-in: its files have the full size, but hold only zeros and take no space on the disk. The result
takes 17 GB and is removed afterwards. The conversion runs in its own process, whose peak is measured. The target is at
most 8 GB.
Writes `results/conversion_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from backbone import RESULTS
from huggingface_hub import split_torch_state_dict_into_shards
from random_qwen import qwen_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.conversion.checkpoints import INDEX
from transformers_nextflow.evaluation.results import write_result


SCRIPT = Path(__file__).parents[1] / "conversion" / "convert_qwen2_5_vl.py"
TARGET_GB = 8.0


def config_7b() -> Qwen2_5_VLConfig:
    text_config = NextFlowConfig.nextflow_7b().text_config.to_dict() | {"vocab_size": 152064}
    return Qwen2_5_VLConfig(text_config=text_config)


def published_name(key: str) -> str:
    """Returns the published name of a weight, without the levels that transformers added later."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_stand_in(folder: Path, config: Qwen2_5_VLConfig, max_shard_size: str = "4GB"):
    """Writes a Qwen2.5-VL in the published layout, in bfloat16, whose files are sparse and hold only zeros."""
    config.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    layout = {published_name(key): tensor.bfloat16() for key, tensor in model.state_dict().items()}
    shards = split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_size)
    for file, keys in shards.filename_to_tensors.items():
        header, offset = {}, 0
        for key in keys:
            end = offset + layout[key].numel() * layout[key].element_size()
            header[key] = {"dtype": "BF16", "shape": list(layout[key].shape), "data_offsets": [offset, end]}
            offset = end
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(described).to_bytes(8, "little") + described)
            out.truncate(out.tell() + offset)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards.tensor_to_filename}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, which is created and removed")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    source, output = arguments.folder / "source", arguments.folder / "output"
    source.mkdir(parents=True)
    try:
        write_stand_in(source, config_7b())
        start = time.perf_counter()
        subprocess.run([sys.executable, SCRIPT, source, output], check=True)
        seconds = time.perf_counter() - start
        # Linux reports KiB.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        written = sum(path.stat().st_size for path in output.iterdir())
    finally:
        shutil.rmtree(arguments.folder)
    verdict = "within" if peak <= TARGET_GB * 1e9 else "above"
    print(f"peak {peak / 2**30:.2f} GiB ({peak / 1e9:.2f} GB, {verdict} {TARGET_GB:.0f} GB), {seconds:.0f} s")
    values = {
        "peak_gib": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        "written_gib": round(written / 2**30, 3),
    }
    print("written:", write_result(Path(arguments.results) / "conversion_memory.json", values))


if __name__ == "__main__":
    main()
