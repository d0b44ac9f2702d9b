"""What all exports refuse."""

import sys
from pathlib import Path

import peft
import pytest
from tiny import tiny_model
from tiny_onecat import tiny_onecat_model
from tiny_tokenflow_t2i import tiny_t2i_model

from transformers_nextflow.adapters import lora_config
from transformers_nextflow.conversion.onecat import export_onecat
from transformers_nextflow.conversion.qwen2_5_vl import export_qwen2_5_vl
from transformers_nextflow.conversion.tokenflow_t2i import export_tokenflow_t2i
from transformers_nextflow.utils.saved_adapters import with_adapters_beside


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from random_qwen import save_qwen  # noqa: E402


EXPORTS = {export_qwen2_5_vl: tiny_model, export_onecat: tiny_onecat_model, export_tokenflow_t2i: tiny_t2i_model}


@pytest.mark.parametrize("export", EXPORTS)
def test_a_model_with_adapters_beside_it_is_not_exported_without_them(export, tmp_path):
    model = EXPORTS[export]()
    peft.get_peft_model(model, lora_config(model, 2))
    with_adapters_beside(model).save_pretrained(tmp_path / "model")
    original = []
    if export is export_qwen2_5_vl:
        save_qwen(tmp_path / "qwen", False, 8, "5GB")
        original = [tmp_path / "qwen"]
    with pytest.raises(ValueError, match="holds adapters beside its weights, which an export would leave out"):
        export(tmp_path / "model", *original, tmp_path / "out")
    assert not (tmp_path / "out").exists()
