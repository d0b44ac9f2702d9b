"""Checkpoints whose parts are broken or do not fit together: each is named when it is loaded."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SCALES, tiny_model, tiny_processor
from transformers import GenerationConfig

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowVQModel
from transformers_nextflow.adapters import lora_config


CODEBOOK = "vq_model.quantizer.pixel_codebook.weight"
LAYER = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with sampling settings, its processor, and an adapter of it beside them."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model()
    model.generation_config.image_sampling = {"guidance_scale": 2.0, "temperature": [1.0, 1.0, 0.5, 0.0]}
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    model = NextFlowForConditionalGeneration.from_pretrained(folder)
    peft.get_peft_model(model, lora_config(model, 2, init_lora_weights=False)).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    copied = shutil.copytree(saved, tmp_path / "model")
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(copied)}))
    return copied


def change(file, **changes):
    """Replace tensors of a file; `None` leaves one out. Names may be the end of a key."""
    tensors = load_file(file)
    for end, make in changes.items():
        [name] = [name for name in tensors if name.endswith(end)]
        tensors[name] = None if make is None else make(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


def with_one(value):
    def make(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return make


def load(folder, **options):
    return NextFlowForConditionalGeneration.from_pretrained(folder, **options)


# --- weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [CODEBOOK, LAYER, "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    change(folder / "model.safetensors", **{name: with_one(value)})
    with pytest.raises(ValueError, match=f"NaN or infinite values in (model.)?{name}, as torch.float32"):
        load(folder)


def test_a_type_that_is_too_small_for_the_weights_is_told(folder):
    change(folder / "model.safetensors", **{LAYER: with_one(1e6)})
    assert load(folder)
    with pytest.raises(ValueError, match=f"infinite values in {LAYER}, as torch.float16"):
        load(folder, dtype=torch.float16)


def test_broken_weights_of_shards_and_pickles_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    for damage, message in (
        (lambda t: t * torch.nan, f"NaN or infinite values in {LAYER}"),
        (lambda t: t.to(torch.int8), f"holds .*(I8|int8) in {LAYER}"),
    ):
        broken = tensors | {LAYER: damage(tensors[LAYER])}
        (folder / "model.safetensors").unlink(missing_ok=True)
        torch.save(broken, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            load(folder)
        names = {name: f"model-0000{1 + ('vq_model' in name)}-of-00002.safetensors" for name in broken}
        for file in set(names.values()):
            save_file({n: t for n, t in broken.items() if names[n] == file}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            load(folder)
        (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused_by_name(folder, dtype):
    change(folder / "model.safetensors", **{CODEBOOK: lambda tensor: (10 * tensor).to(dtype)})
    with pytest.raises(ValueError, match=f"The checkpoint holds .* in model.{CODEBOOK}; save floats"):
        load(folder)


def test_tensors_that_the_model_does_not_use_may_be_anything(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.position_ids"] = torch.arange(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder)


def test_a_vision_tokenizer_is_checked_too(tmp_path):
    tiny_model().vq_model.save_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", **{"pixel_codebook.weight": with_one(torch.nan)})
    with pytest.raises(ValueError, match="NaN or infinite values in quantizer.pixel_codebook.weight"):
        NextFlowVQModel.from_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", **{"pixel_codebook.weight": lambda t: t.nan_to_num().short()})
    with pytest.raises(ValueError, match="holds I16 in quantizer.pixel_codebook.weight"):
        NextFlowVQModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_one(torch.nan), "NaN or infinite values in .*layers.0.mlp.up_proj.lora_B"),
        (lambda t: t.to(torch.int8), "holds .*int8 in .*layers.0.mlp.up_proj.lora_B|holds I8 in .*lora_B"),
        (None, "lacks .*layers.0.mlp.up_proj.lora_B"),
    ],
)
def test_an_adapter_is_checked_as_its_base_is(folder, make, message):
    change(folder / "adapter" / "adapter_model.safetensors", **{"layers.0.mlp.up_proj.lora_B.weight": make})
    with pytest.raises(ValueError, match=message):
        load(folder / "adapter")
    with pytest.raises(ValueError, match=message):
        load(folder).load_adapter(folder / "adapter")


def test_what_the_base_of_an_adapter_lacks_is_named(folder):
    assert NextFlowPipeline.from_pretrained(folder / "adapter")
    change(folder / "model.safetensors", **{LAYER: None})
    with pytest.raises(ValueError, match=f"lacks {LAYER}"):
        load(folder / "adapter")


# --- the generation config ---


def test_settings_of_a_model_that_was_made_in_memory_outlive_saving(tmp_path):
    model = tiny_model()
    model.generation_config.image_sampling = {"guidance_scale": 2.0}
    model.generation_config.editing_sampling = {"guidance_scale": 3.0, "temperature": [0.5, 0.5, 0.0, 0.0]}
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        model = load(tmp_path / str(number))
        assert model.default_image_sampling == ImageSampling(guidance_scale=2.0)
        assert model.default_editing_sampling == ImageSampling(guidance_scale=3.0, temperature=[0.5, 0.5, 0.0, 0.0])


def test_a_lost_generation_config_is_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(folder).default_image_sampling.guidance_scale == 2
        assert NextFlowPipeline.from_pretrained(folder).model.default_image_sampling.guidance_scale == 2
    (folder / "generation_config.json").unlink()
    with pytest.warns(UserWarning, match="no image_sampling in generation_config.json of .*/model: images are"):
        assert load(folder).default_image_sampling.guidance_scale == 1
    with pytest.warns(UserWarning, match="no image_sampling in generation_config"):
        NextFlowPipeline.from_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="no eos_token_id"),
        pytest.warns(UserWarning, match="no image_sampling in gen"),
    ):
        load(folder)
    given = GenerationConfig(image_sampling={"guidance_scale": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(folder, generation_config=given).default_image_sampling.guidance_scale == 3


def test_a_new_model_has_no_settings_to_lose(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path).save_pretrained(tmp_path / "again")
        assert load(tmp_path / "again").default_image_sampling == ImageSampling()


def test_a_generation_config_that_ends_no_text_is_warned_of(folder):
    file = folder / "generation_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in stored.items() if name != "eos_token_id"}))
    with pytest.warns(UserWarning, match="no eos_token_id in generation_config.json of .*/model: text goes on"):
        assert load(folder).generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda config: config.update(rope_range=float("nan")), "rope_range"),
        (lambda config: config["text_config"]["rope_parameters"].update(rope_theta=float("inf")), "rope_theta"),
        (lambda config: config["text_config"].update(rms_norm_eps=float("nan")), "text_config.rms_norm_eps"),
        (lambda config: config["vq_config"].update(pixel_distance_weight=float("nan")), "pixel_distance_weight"),
        (lambda config: config["vq_config"]["semantic_config"].update(layer_norm_eps=float("nan")), "layer_norm_eps"),
    ],
)
def test_a_config_with_a_number_that_is_not_finite_is_refused_by_name(folder, change, name):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(Exception, match=f"{name} must be a finite number") as error:
        load(folder)
    assert "finite" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "generation_config.json is not valid JSON"),
        ('{"image_sampling": {"guidance_scale": 2.0}', "generation_config.json is not valid JSON"),
        ("\xff", "generation_config.json is not valid JSON"),
        ("[]", "generation_config.json holds a list"),
        ("null", "generation_config.json holds a NoneType"),
        ({"image_sampling": []}, r"image_sampling in .* are a dict, got \[\]"),
        ({"image_sampling": 2}, "image_sampling in generation_config.json of .* are a dict, got 2"),
        ({"image_sampling": ["guidance_scale"]}, r"are a dict, got \['guidance_scale'\]"),
        ({"image_sampling": {"guidance": 2}}, r"image_sampling in .* has no 'guidance'"),
        ({"image_sampling": {"guidance_scale": "2"}}, "guidance_scale must be at least 0 .* got '2'"),
        (
            {"image_sampling": {"temperature": [1.0] * 3}},
            "temperature gives 3 values, but .* in 4 scales",
        ),
        ({"image_sampling": {}, "editing_sampling": {"top_k": 0}}, "editing_sampling in .* top_k must be"),
        ({"image_sampling": {}, "editing_sampling": {"top_p": [1] * 5}}, "editing_sampling in .* top_p gives 5 values"),
    ],
)
def test_a_broken_generation_config_is_refused_by_name(folder, content, message):
    file = folder / "generation_config.json"
    file.write_bytes(content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    with pytest.raises(ValueError, match=message):
        NextFlowPipeline.from_pretrained(folder)


# --- model and processor ---


def read_last(processor):
    processor.read_last_scale = True


def other_image_token(processor):
    processor.image_token_id += 1


def unit_range(processor):
    processor.image_processor.do_normalize = False


def more_tokens(processor):
    processor.tokenizer.add_tokens(["a new word"])


MISFITS = [
    (lambda: tiny_processor(read_last_scale=True), "read_last_scale True and False"),
    (lambda: tiny_processor(scales=(1, 2, 4)), r"scales \[1, 2, 4\] and \[1, 2, 3, 4\]"),
    (lambda: tiny_processor(patch_size=8), "patch_size 8 and 4"),
    (lambda: tiny_processor(levels=[[8, 2], [16, 4]]), r"levels \(\(8, 2\), \(16, 4\)\) and \(\(16, 4\),\)"),
    (lambda: changed(other_image_token), "image_token_id .* and"),
    (lambda: changed(unit_range), r"range of pixel values \(0.0, 1.0\) and \(-1.0, 1.0\)"),
    (lambda: changed(more_tokens), "321 tokens and a vocabulary of 320"),
]


def changed(change):
    processor = tiny_processor()
    change(processor)
    return processor


@pytest.mark.parametrize(("make", "message"), MISFITS)
def test_a_processor_that_does_not_fit_its_model_is_refused_by_what_differs(make, message):
    with pytest.raises(ValueError, match=f"Processor and model do not fit together: .*{message}.* from one checkpoint"):
        NextFlowPipeline(tiny_model(), make())


def test_a_folder_with_the_processor_of_another_model_is_refused(folder):
    tiny_processor(scales=(1, 2), read_last_scale=True).save_pretrained(folder)
    with pytest.raises(ValueError, match="scales .* and .*levels .* and .*read_last_scale True and False"):
        NextFlowPipeline.from_pretrained(folder)


def test_levels_that_are_written_out_are_those_that_are_left_out():
    assert NextFlowPipeline(tiny_model(), tiny_processor(levels=[[16, len(SCALES)]]))


def test_trainers_refuse_a_processor_that_does_not_fit(tmp_path):
    from transformers_nextflow.trainers import NextFlowTrainer, NextFlowTrainingArguments

    processor = tiny_processor(read_last_scale=True)
    args = NextFlowTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="do not fit together: read_last_scale True and False"):
        NextFlowTrainer(tiny_model(), args, processing_class=processor)
    pytest.importorskip("trl")
    from datasets import Dataset

    from transformers_nextflow.trainers import NextFlowGRPOTrainer

    rows = Dataset.from_dict({"prompt": ["one"]})
    with pytest.raises(ValueError, match="do not fit together: read_last_scale True and False"):
        NextFlowGRPOTrainer(tiny_model(), len, train_dataset=rows, processing_class=processor)
