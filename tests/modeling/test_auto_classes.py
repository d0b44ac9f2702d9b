"""transformers' Auto classes in a fresh process after `import transformers_nextflow`, and its pipeline."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import transformers_nextflow


ROOT = Path(__file__).parents[2]
LOAD = """
import sys
import transformers, transformers_nextflow
# transformers 5.17 shows it at its top level only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    auto = AutoImageProcessor if name == "AutoImageProcessor" else getattr(transformers, name)
    print(type(auto.from_pretrained(folder)).__name__)
"""
EXPECTED = [
    ("AutoConfig", "", "NextFlowConfig"),
    ("AutoModel", "", "NextFlowModel"),
    ("AutoModelForCausalLM", "", "NextFlowForConditionalGeneration"),
    ("AutoModelForImageTextToText", "", "NextFlowForConditionalGeneration"),
    ("AutoModelForMultimodalLM", "", "NextFlowForConditionalGeneration"),
    ("AutoProcessor", "", "NextFlowProcessor"),
    ("AutoImageProcessor", "", "NextFlowImageProcessor"),
    ("AutoConfig", "vq_model", "NextFlowVQConfig"),
    ("AutoModel", "vq_model", "NextFlowVQModel"),
]


def test_auto_classes_load_a_checkpoint_in_a_fresh_process(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model.vq_model.save_pretrained(tmp_path / "vq_model")

    source = Path(transformers_nextflow.__file__).parents[1]
    arguments = [text for name, folder, _ in EXPECTED for text in (name, str(tmp_path / folder))]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [loaded for _, _, loaded in EXPECTED]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_image_processor_is_one_for_all_backends_and_loads_without_a_warning(backend, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = AutoImageProcessor.from_pretrained(ROOT / "checkpoints" / "nextflow-shapes", backend=backend)
    assert type(processor) is transformers_nextflow.NextFlowImageProcessor and not caplog.records


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_pipeline_answers_a_question_about_a_image(read_last_scale):
    processor = tiny_processor(read_last_scale=read_last_scale)
    model = tiny_model(read_last_scale=read_last_scale)
    answer = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    question = [{"type": "image", "image": Image.new("RGB", (40, 20), "red")}, {"type": "text", "text": "how many?"}]
    conversation = [{"role": "user", "content": question}]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "min_new_tokens": 4}
    (found,) = answer(text=conversation, generate_kwargs=options, return_full_text=False)

    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_grids"].tolist() == [[3, 6]]
    written = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"] == processor.tokenizer.decode(written, skip_special_tokens=True)


def test_the_pipeline_for_text_writes_what_the_model_writes(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (found,) = writer("a red circle", max_new_tokens=4, do_sample=False, return_full_text=False)
    inputs = processor.tokenizer("a red circle", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"] == processor.tokenizer.decode(written, skip_special_tokens=True)
