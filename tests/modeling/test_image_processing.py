"""The image processor: every kind of image in, the schedules' sizes out."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision

import transformers_nextflow  # noqa: F401  (registers the Auto classes)
from transformers_nextflow.image_processing_nextflow import NextFlowImageProcessor


SIDES = (1, 1, 2, 2, 4, 8)


@pytest.fixture
def processor():
    return NextFlowImageProcessor(scales=SIDES, patch_size=8)


def noise(height=64, width=64, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(processor, image, **kwargs):
    """(3, height, width) uint8 as the processor sees the image."""
    values = processor(image, return_tensors="np", **kwargs)["pixel_values"][0]
    return np.rint((values + 1) * 127.5).astype(np.uint8)


def test_a_image_of_a_drawn_size_keeps_its_pixels(processor):
    array = noise()
    output = processor(Image.fromarray(array), return_tensors="pt")
    assert output["pixel_values"].shape == (1, 3, 64, 64)
    assert output["pixel_values"].dtype == torch.float32
    assert output["image_grids"].tolist() == [[8, 8]]
    assert np.array_equal(pixels(processor, Image.fromarray(array)), array.transpose(2, 0, 1))
    assert -1 <= output["pixel_values"].min() < -0.9 and 0.9 < output["pixel_values"].max() <= 1


def test_postprocessing_undoes_preprocessing(processor):
    image = Image.fromarray(noise())
    values = processor(image, return_tensors="pt")["pixel_values"]
    assert processor.postprocess(values)[0].tobytes() == image.tobytes()
    assert np.array_equal(np.rint(processor.postprocess(values, "np")[0] * 255), np.asarray(image))
    assert torch.allclose(processor.postprocess(values, "pt")[0], values[0] / 2 + 0.5)


def test_postprocessing_clamps_and_takes_bfloat16(processor):
    shown = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 8, 16).bfloat16()
    (image,) = processor.postprocess([shown])
    assert image.size == (16, 8)
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_an_unknown_output_type_is_refused(processor):
    with pytest.raises(ValueError, match="output_type must be one of .* got 'jpeg'"):
        processor.postprocess([], output_type="jpeg")


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (480, 640), (1000, 250), (250, 1000), (97, 131), (1, 1), (1, 4)]
)
def test_images_go_to_the_nearest_schedule(processor, height, width):
    output = processor(Image.new("RGB", (width, height), "red"), return_tensors="pt")
    schedule = processor.scale_schedules.nearest(height, width)
    assert tuple(output["image_grids"][0].tolist()) == schedule.final_grid
    assert output["pixel_values"].shape[-2:] == schedule.image_size(8)
    assert torch.allclose(output["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_resizing_keeps_the_aspect_ratio_and_cuts_both_sides_evenly(processor):
    array = np.zeros((64, 66, 3), dtype=np.uint8)
    array[:, 1:65] = noise()
    assert np.array_equal(pixels(processor, array), noise().transpose(2, 0, 1))


def test_images_of_a_batch_are_padded_on_the_right_and_at_the_bottom(processor):
    wide, tall = Image.new("RGB", (256, 64), "white"), Image.new("RGB", (64, 256), "white")
    output = processor([wide, tall], return_tensors="pt")
    (h0, w0), (h1, w1) = (output["image_grids"] * 8).tolist()
    values = output["pixel_values"]
    assert values.shape == (2, 3, max(h0, h1), max(w0, w1))
    assert (values[0, :, :h0, :w0] == 1).all() and (values[0, :, h0:] == 0).all()
    assert (values[1, :, :h1, :w1] == 1).all() and (values[1, :, :, w1:] == 0).all()


def test_every_kind_of_input_gives_the_same_values(processor):
    array = noise()
    expected = pixels(processor, Image.fromarray(array))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    arrays = (array, array.transpose(2, 0, 1), array / 255, array.astype(np.int64))
    for image in (*arrays, tensor, tensor / 255, tensor[None]):
        assert np.array_equal(pixels(processor, image), expected)
    assert np.array_equal(pixels(processor, array.astype(np.uint16) * 257), expected)


def test_paths_are_opened_with_their_transparency(processor, tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for path in (tmp_path / "clear.png", str(tmp_path / "clear.png")):
        assert (pixels(processor, path) == 255).all()


def test_transparent_pixels_are_put_on_white(processor):
    array = noise(channels=4)
    alpha = array[..., 3:].astype(float) / 255
    expected = array[..., :3] * alpha + 255 * (1 - alpha)
    for image in (Image.fromarray(array), array):
        assert np.abs(pixels(processor, image) - expected.transpose(2, 0, 1)).max() <= 1
    grey_with_alpha = Image.merge("LA", (Image.new("L", (64, 64), 100), Image.new("L", (64, 64), 0)))
    assert (pixels(processor, grey_with_alpha) == 255).all()


def test_palettes_are_looked_up_with_their_transparent_colour(processor):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (pixels(processor, image)[:, 0, 0] == (255, 0, 0)).all()
    image.info["transparency"] = 1
    assert (pixels(processor, image) == 255).all()


def test_sixteen_bit_greys_are_brought_to_eight_bits(processor, tmp_path):
    array = noise(channels=1).astype(np.uint16) * 257
    Image.fromarray(array).save(tmp_path / "grey.png")
    opened = Image.open(tmp_path / "grey.png")
    assert opened.mode.startswith("I")
    for image in (opened, Image.fromarray(array.astype(np.int32)), array[..., None]):
        assert np.array_equal(pixels(processor, image)[1], noise(channels=1))
    with pytest.raises(ValueError, match="beyond 16 bits"):
        processor(Image.fromarray(np.full((64, 64), 70000, dtype=np.int32)))


def test_grey_one_bit_float_and_cmyk_images_become_rgb(processor):
    for mode, colour, expected in (("L", 77, 77), ("1", 1, 255), ("F", 0.2, 51), ("CMYK", (0, 0, 0, 0), 255)):
        assert (pixels(processor, Image.new(mode, (64, 64), colour)) == expected).all()


def test_the_orientation_of_a_photograph_is_obeyed(processor):
    file, exif = BytesIO(), Image.Exif()
    exif[274] = 6  # turn by a quarter
    Image.new("RGB", (128, 64)).save(file, "JPEG", exif=exif)
    height, width = processor(Image.open(file), return_tensors="pt")["image_grids"][0]
    assert height > width


def test_one_by_four_thousand_pixels_are_refused(processor):
    with pytest.raises(ValueError, match="Image 1 cannot be used: The aspect ratio of 1x4000 .* Crop or pad it"):
        processor([Image.new("RGB", (64, 64)), Image.new("RGB", (4000, 1))])


def test_a_truncated_file_is_refused_by_name(processor, tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(noise()).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="Image 1 cannot be read: .*cut.png .*truncated"):
        processor([Image.new("RGB", (64, 64)), Image.open(path)])
    with pytest.raises(ValueError, match="cut.png cannot be read as an image: .*truncated"):
        processor(str(path))
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(ValueError, match="cut.png cannot be read as an image"):
        processor(str(path))


def test_values_outside_their_range_are_refused(processor):
    for image in (noise() * 1.0, np.full((64, 64, 3), -1), np.full((64, 64, 3), np.nan)):
        with pytest.raises(ValueError, match="Image 0 cannot be read: .* values go from"):
            processor(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 7), dtype=np.uint8), "no axis of 1 to 4 channels"),
        (np.zeros(64), r"shape \(64,\) does not have 2 or 3 axes"),
        (np.zeros((1, 1, 3, 64, 64)), r"shape \(1, 1, 3, 64, 64\) does not have 2 or 3 axes"),
        (np.full((64, 64), np.nan), "go from nan to nan"),
        (np.zeros((64, 64), dtype=complex), "complex128 values are not pixel values"),
        (np.full((64, 64), "a"), "<U1 values are not pixel values"),
        (np.zeros((0, 64)), "at least 1 pixel, got 0x64"),
        ([[0.5] * 64] * 64, "it is 0.5, not a PIL image"),
        (None, "it is None, not a PIL image"),
        ({"image": np.zeros((64, 64))}, r"it is {'image': <ndarray of shape \(64, 64\)>}, not a PIL image"),
    ],
)
def test_what_is_no_image_is_refused_without_printing_it(processor, image, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(image)
    assert len(str(error.value)) < 200


def test_greys_come_as_two_axes(processor):
    array = noise(channels=1)
    expected = pixels(processor, Image.fromarray(array))
    tensor = torch.from_numpy(array)
    for image in (array, array / 255, array.astype(np.int64), array.astype(np.uint16) * 257, tensor, tensor / 255):
        assert np.array_equal(pixels(processor, image), expected)
        assert np.array_equal(pixels(processor, image, input_data_format="channels_first"), expected)
    assert np.array_equal(pixels(processor, array > 127)[0], 255 * (array > 127))
    batch = processor([[array, tensor / 255], [np.stack([noise(), noise()])]], return_tensors="np")["pixel_values"]
    assert batch.shape == (4, 3, 64, 64) and np.array_equal(batch[0], batch[1])


FLOATS = {
    "float32": lambda a: a.astype(np.float32) / 255,
    "float64": lambda a: a / 255,
    "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
    "bfloat16": lambda a: (torch.from_numpy(a).permute(2, 0, 1) > 127).bfloat16(),
    "grey": lambda a: a[..., 0] / 255,
    "F": lambda a: Image.fromarray(a[..., 0].astype(np.float32) / 255),
}
INTEGERS = {
    "uint8": lambda a: a,
    "int64": lambda a: a.astype(np.int64),
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "bool": lambda a: a > 127,
    "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "PIL": Image.fromarray,
}


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_have_their_values_with_rescaling_and_without_it(processor, kind):
    image = FLOATS[kind](noise())
    for do_normalize in (True, False):
        expected = processor(image, do_normalize=do_normalize, return_tensors="np")["pixel_values"]
        found = processor(image, do_normalize=do_normalize, do_rescale=False, return_tensors="np")["pixel_values"]
        assert np.array_equal(found, expected) and found.max() == 1
    for factor in (1.0, 1 / 127.5, float("nan")):
        with pytest.raises(ValueError, match="Image 0 cannot be used: it holds floats .* use do_rescale=False"):
            processor(image, rescale_factor=factor)
    with pytest.raises(ValueError, match="from 0 to 1 would be normalised to -1 to -0.99"):
        processor(image, image_mean=[127.5] * 3, image_std=[127.5] * 3)


def test_floats_keep_their_values_to_eight_bits(processor):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    values = processor(image, do_rescale=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, 2 * image - 1, atol=1 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_are_normalised_in_their_own_unit_only(processor, kind):
    image = INTEGERS[kind](noise())
    expected = processor(image, return_tensors="np")["pixel_values"]
    unit = {"image_mean": [127.5] * 3, "image_std": [127.5] * 3}
    found = processor(image, do_rescale=False, **unit, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert processor(image, do_rescale=False, do_normalize=False)["pixel_values"].max() == 255
    assert processor(image, rescale_factor=1 / 127.5, do_normalize=False)["pixel_values"].max() == 2
    for settings in ({"do_rescale": False}, {"rescale_factor": 1.0}, {"image_std": [0.0] * 3}, unit):
        with pytest.raises(ValueError, match="Image 0 cannot be used: its values from 0 to .* would be normalised"):
            processor(image, **settings)
    with pytest.raises(ValueError, match="Image 1 cannot be used"):
        processor([noise() / 255, image], do_rescale=False)


def test_integers_and_floats_go_together(processor):
    integers, floats = noise(), noise() / 255
    values = processor([integers, floats], return_tensors="np")["pixel_values"]
    assert np.array_equal(values[0], values[1])
    values = processor([integers, floats], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(values[0], 255 * values[1], atol=1e-3)


def test_the_axis_of_the_channels_can_be_told(processor):
    array = noise(3, 3)
    first = pixels(processor, array, input_data_format="channels_first")
    assert np.array_equal(first, pixels(processor, torch.from_numpy(array)))
    assert not np.array_equal(first, pixels(processor, array))
    with pytest.raises(ValueError, match="no axis of 1 to 4 channels"):
        processor(noise(), input_data_format="channels_first")


def test_no_images_are_refused(processor):
    with pytest.raises(ValueError, match="no image in the list"):
        processor([])


def test_without_resizing_only_drawn_sizes_are_taken(processor):
    assert processor(noise(), do_resize=False)["image_grids"].tolist() == [[8, 8]]
    with pytest.raises(ValueError, match="Size 65x64 is not a multiple of 8; the nearest that is: 64x64"):
        processor(noise(65, 64), do_resize=False)


def test_without_conversion_only_rgb_is_taken(processor):
    with pytest.raises(ValueError, match="its mode is 'L'"):
        processor(Image.new("L", (64, 64)), do_convert_rgb=False)


def test_the_level_is_the_nearest_in_area_or_the_one_asked_for():
    processor = NextFlowImageProcessor(scales=(1, 2, 4, 8), patch_size=8, levels=[[32, 3], [64, 4]])
    small, large = Image.new("RGB", (30, 30)), Image.new("RGB", (500, 500))
    assert processor([small, large])["image_grids"].tolist() == [[4, 4], [8, 8]]
    assert processor([small, large], level=32)["image_grids"].tolist() == [[4, 4], [4, 4]]
    with pytest.raises(ValueError, match="Level 33 is none of"):
        processor(small, level=33)


def test_arguments_of_a_call_win_over_the_processors_own():
    processor = NextFlowImageProcessor(scales=SIDES, patch_size=8, do_normalize=False)
    white = Image.new("RGB", (64, 64), "white")
    assert processor(white)["pixel_values"].max() == 1
    assert processor(white, do_rescale=False)["pixel_values"].max() == 255
    half = processor(white, do_normalize=True, image_mean=[0.0] * 3, image_std=[2.0] * 3)["pixel_values"]
    assert half.max() == 0.5


def test_sizes_are_the_schedules_matter(processor):
    with pytest.raises(ValueError, match="size"):
        processor(noise(), size={"height": 32, "width": 32})


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="start at 1"):
        NextFlowImageProcessor(scales=(2, 4))


def test_it_is_saved_and_loaded(tmp_path):
    levels = [[32, 5], [64, 6]]
    processor = NextFlowImageProcessor(scales=SIDES, patch_size=8, levels=levels, level=64)
    processor.save_pretrained(tmp_path)
    for loaded in (NextFlowImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is NextFlowImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.scale_schedules == processor.scale_schedules
    assert NextFlowImageProcessor.from_pretrained(tmp_path, level=32).level == 32
