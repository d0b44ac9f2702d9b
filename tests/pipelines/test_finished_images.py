"""What every image passes before it is handed out, and what its file says."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from test_pipeline import quiet, seeded
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.utils.provenance import SOFTWARE, GeneratedImage, read_provenance


@pytest.fixture
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


class BlackensAll:
    """A checker of diffusers' shape that finds fault with everything, and counts."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images, clip_input):
        self.asked += len(images)
        assert images.shape[1:] == (16, 16, 3) and 0 <= images.min() and images.max() <= 1
        return np.zeros_like(images), [True] * len(images)


def is_black(image) -> bool:
    return np.asarray(image).max() == 0


def test_no_image_passes_a_safety_checker_by(pipe):
    plain = pipe("a red circle", generator=seeded())
    assert plain.nsfw_content_detected is None and not is_black(plain.images[0])
    pipe.safety_checker, previews = BlackensAll(), []
    drawn = pipe(
        ["a red circle", "one"],
        callback_on_step_end=lambda pipe, step, scale, kwargs: previews.extend(kwargs["preview"]),
        callback_on_step_end_tensor_inputs=["preview"],
    )
    assert drawn.nsfw_content_detected == [True, True] and all(map(is_black, drawn.images)) and len(previews) == 8
    assert all(map(is_black, previews))
    assert all(map(is_black, pipe.video("one", num_frames=2, max_transition_tokens=1).frames[0]))
    answer = pipe.chat([{"role": "user", "content": "one"}], min_images=1, max_new_tokens=1)
    assert all(is_black(part["image"]) for part in answer["content"] if part["type"] == "image")
    assert is_black(NextFlowPipeline.from_pipe(pipe)("one").images[0])


def test_an_image_that_is_found_safe_is_left_to_the_bit(pipe):
    expected = pipe("a red circle", generator=seeded(), output_type="pt").images
    pipe.safety_checker = lambda images, clip_input: (images, [False])
    drawn = pipe("a red circle", generator=seeded(), output_type="pt")
    assert torch.equal(drawn.images, expected) and drawn.nsfw_content_detected == [False]


def test_a_checker_of_another_shape_is_refused(pipe):
    pipe.safety_checker = lambda images, clip_input: (images[0], [])
    with pytest.raises(ValueError, match="safety_checker must return as many images and flags"):
        pipe("one")


def test_a_hook_that_is_none_is_refused_before_anything_is_drawn(pipe, monkeypatch):
    def draws(*_, **__):
        raise AssertionError("it draws")

    for name in ("generate_images", "generate_interleaved"):
        monkeypatch.setattr(pipe.model, name, draws)
    pipe.safety_checker = "none"
    calls = [lambda: pipe("one"), lambda: pipe.video("one", num_frames=2)]
    for call in (*calls, lambda: pipe.chat([{"role": "user", "content": "one"}])):
        with pytest.raises(ValueError, match="safety_checker must be a function"):
            call()


def test_the_checker_of_stable_diffusion_fits(pipe):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import BatchFeature, CLIPConfig

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    pipe.safety_checker = StableDiffusionSafetyChecker(config).eval()
    pipe.feature_extractor = lambda images, return_tensors: BatchFeature(
        {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])}
    )
    assert len(pipe("one").nsfw_content_detected) == 1


def test_a_watermark_is_put_on_every_image(pipe):
    class Stripe:
        def apply_watermark(self, images):
            assert images.shape == (1, 3, 16, 16) and images.abs().max() <= 1
            images = images.clone()
            images[..., 0, :] = 1.0
            return images

    pipe.watermark = Stripe()
    for image in (pipe("one").images[0], pipe.video("one", num_frames=2, max_transition_tokens=1).frames[0][1]):
        assert np.asarray(image)[0].min() == 255


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif"])
def test_the_file_of_an_image_says_what_drew_it(pipe, extension, tmp_path):
    pipe.register_to_config(_name_or_path=str(tmp_path))
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    images = pipe("a red circle", num_images_per_prompt=2, generator=seeds, guidance_scale=2.0).images
    for number, image in enumerate(images):
        for shown in (image, image.resize((32, 32)), image.crop((0, 0, 8, 8))):
            path = tmp_path / f"image.{extension}"
            shown.save(path)
            found = read_provenance(path)
            assert found["software"] == SOFTWARE and found["seed"] == 7 + number and "image" not in found
            assert found["settings"]["guidance_scale"] == 2.0 and found["checkpoint"] == tmp_path.name
            assert "a red circle" not in str(found) and str(tmp_path) not in str(found)
    pipe.adds_provenance = False
    pipe("one").images[0].save(tmp_path / f"plain.{extension}")
    assert read_provenance(tmp_path / f"plain.{extension}") is None


def test_the_best_of_several_candidates_names_its_own_seed(pipe):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn = pipe("one", num_candidates=3, generator=seeds, candidate_scorer=lambda *_: [0.0, 0.5, 1.0])
    assert drawn.images[0].provenance["seed"] == 2


def test_a_generator_that_was_used_before_gives_an_image_no_seed(pipe):
    one, several = seeded(), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    torch.rand(1, generator=several[1])
    message = [{"role": "user", "content": "one"}]
    for expected in (0, None):
        assert pipe("one", generator=one).images[0].provenance["seed"] == expected
    assert [image.provenance["seed"] for image in pipe(["one", "two"], generator=several).images] == [1, None]
    one.manual_seed(3)
    for expected in (3, None):
        video = pipe.video("one", num_frames=2, max_transition_tokens=1, generator=one).frames[0]
        assert [frame.provenance["seed"] for frame in video] == [expected] * 2
    one.manual_seed(4)
    for expected in (4, None):
        answer = pipe.chat(message, min_images=1, max_new_tokens=1, generator=one)
        [seed] = [part["image"].provenance["seed"] for part in answer["content"] if part["type"] == "image"]
        assert seed == expected


def test_an_interrupted_image_says_after_how_many_scales(pipe):
    def stop(pipe, step, scale, values):
        pipe._interrupt = scale == 1

    drawn = pipe("one", generator=seeded(), callback_on_step_end=stop)
    assert drawn.images[0].provenance["interrupted_after_scales"] == 2
    assert "interrupted_after_scales" not in pipe("one", generator=seeded()).images[0].provenance
    sampling = {"callback": lambda model, scale, state: scale < 2, "min_images": 1, "max_new_tokens": 1}
    *_, part = pipe.chat([{"role": "user", "content": "one"}], **sampling)["content"]
    assert part["image"].provenance["interrupted_after_scales"] == 3


def test_an_image_names_the_adapters_that_drew_it_and_never_a_path(pipe, tmp_path):
    adapted = get_peft_model(tiny_model(), lora_config(tiny_model(), rank=2))
    adapted.save_pretrained(tmp_path)
    pipe = quiet(NextFlowPipeline(tiny_model(), pipe.processor))
    assert "adapters" not in pipe("one").images[0].provenance
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    pipe.register_to_config(_name_or_path="/home/somebody/models/gone")
    found = pipe("one").images[0].provenance
    assert found["adapters"] == {"style": 0.5} and found["checkpoint"] == "gone"
    pipe.disable_lora()
    pipe.register_to_config(_name_or_path="somebody/model")
    found = pipe("one").images[0].provenance
    assert "adapters" not in found and found["checkpoint"] == "somebody/model"


def test_an_image_whose_codes_a_callback_changed_has_no_seed(pipe):
    def first_of_two(pipe, step, scale, values):
        if scale == 0:
            values["image_tokens"][0] += 1 - 2 * (values["image_tokens"][0] > 0).long()
        return values

    drawn = pipe(["one", "two"], generator=[seeded(), torch.Generator()], callback_on_step_end=first_of_two)
    assert [image.provenance["seed"] for image in drawn.images] == [None, torch.Generator().initial_seed()]


def test_an_image_with_provenance_equals_its_pixels_and_keeps_what_is_asked_for(tmp_path):
    plain = Image.new("RGB", (4, 4), "red")
    image = GeneratedImage.of(plain, {"seed": 1})
    assert image == plain and plain == image and image != Image.new("RGB", (4, 4), "blue") and image != 3
    image.save(tmp_path / "comment.gif", comment="mine")
    with Image.open(tmp_path / "comment.gif") as saved:
        assert saved.info["comment"] == b"mine"
    image.save(tmp_path / "image.bmp")
    assert Image.open(tmp_path / "image.bmp").convert("RGB") == image
