"""What all exports refuse."""

import sys
from pathlib import Path

import peft
import pytest
from tiny import tiny_model, tiny_processor
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.conversion.onecat import export_onecat
from transformers_nextflow.conversion.qwen2_5_vl import export_qwen2_5_vl
from transformers_nextflow.conversion.tokenflow_t2i import export_tokenflow_t2i


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from random_qwen import save_qwen  # noqa: E402


EXPORTS = {
    export_qwen2_5_vl: (tiny_model, tiny_processor),
    export_onecat: (tiny_onecat_model, tiny_onecat_processor),
    export_tokenflow_t2i: (tiny_t2i_model, tiny_t2i_processor),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_a_model_with_adapters_beside_it_is_not_exported_without_them(export, tmp_path):
    model, processor = (make() for make in EXPORTS[export])
    peft.get_peft_model(model, lora_config(model, 2))
    NextFlowPipeline(model, processor).save_pretrained(tmp_path / "pipeline")
    original = []
    if export is export_qwen2_5_vl:
        save_qwen(tmp_path / "qwen", False, 8, "5GB")
        original = [tmp_path / "qwen"]
    with pytest.raises(ValueError, match="holds adapters beside its weights, which an export would leave out"):
        export(tmp_path / "pipeline", *original, tmp_path / "out")
    assert not (tmp_path / "out").exists()
