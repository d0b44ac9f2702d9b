"""Images to pixel values and back, with PIL and numpy only: no torchvision is needed."""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict, get_type_hints

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict, is_torch_tensor
from transformers.processing_utils import Unpack

from .scale_schedule import SQUARE_SIDES, ScaleSchedule, ScaleSchedules, max_frames_of_level, schedules_of
from .utils.atomic_files import atomic_save
from .utils.image_files import read_image
from .utils.known_names import check_names
from .utils.short_repr import short_repr
from .utils.typed_values import check_types


OUTPUT_TYPES = ("pil", "np", "pt")
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# The factor that maps 8-bit values to [0, 1].
RESCALE_FACTOR = 1 / 255
# The range that usual means and deviations give to values from 0 to 1; those meant for 0 to 255 give another range.
LARGEST_NORMALIZED, SMALLEST_RANGE = 2.9, 0.1


class NextFlowImageProcessorKwargs(TypedDict, total=False):
    r"""
    level (`int`, *optional*):
        Resolution (side of the square image, in pixels) at which images are read; one of the model's levels.
        Default: for each image the level nearest in area.
    """

    # Not the library's `ImagesKwargs`: its `size` and `crop_size` would be accepted and then ignored, since only the
    # schedules decide the sizes.
    do_convert_rgb: bool | None
    do_resize: bool | None
    level: int | None
    resample: int | PILImageResampling | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    input_data_format: str | None
    return_tensors: str | None


IMAGE_SETTINGS = get_type_hints(NextFlowImageProcessorKwargs)
# Other entries of files of settings.
SAVED = ("feature_extractor_type", "image_processor_type", "processor_class", "auto_map", "transformers_version")


class NextFlowImageProcessor(PilBackend):
    r"""Resizes images to the sizes of the scale schedules, and maps their values to [-1, 1].

    Each image gets the schedule with the nearest aspect ratio: it is resized until it covers that size, and what is
    left over is cropped evenly on both sides. The orientation that a file states is applied, transparent pixels are put
    on white, and 16-bit values are reduced to 8 bits.

    Images are PIL images, paths, URLs, bytes, open files, base64 (see `read_image`), numpy arrays (height, width,
    channels; also channels first) or torch tensors (channels, height, width; also channels last), of uint8, of uint16,
    or of floats in [0, 1], which are rounded to 8 bits; greys may come as (height, width). A list may hold lists, and
    an array with four axes is a list of images.

    Floats lie in [0, 1] with and without `do_rescale`. 8-bit values need `do_rescale` to be normalised, unless
    `image_mean` and `image_std` are meant for values from 0 to 255.

    Args:
        scales, patch_size, levels: as in [`NextFlowVQConfig`].
        do_convert_rgb: turn other kinds of image into RGB; if False they are refused.
        do_resize: resize and crop; if False an image must have exactly a size of the scale schedules.
    """

    model_input_names = ["pixel_values", "image_grids"]
    valid_kwargs = NextFlowImageProcessorKwargs
    save_pretrained = atomic_save(PilBackend.save_pretrained)

    do_convert_rgb = True
    do_resize = True
    level = None
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        scales: Sequence[int] = SQUARE_SIDES,
        patch_size: int = 16,
        levels: Sequence[Sequence[int]] | None = None,
        **kwargs: Unpack[NextFlowImageProcessorKwargs],
    ):
        # Saved settings also hold names of the library's settings, without a value.
        _check_settings({name: value for name, value in kwargs.items() if value is not None and name not in SAVED})
        super().__init__(**kwargs)
        self.scales, self.patch_size, self.levels = scales, patch_size, levels
        self.scale_schedules  # raises for invalid scales and levels
        # Lists, as after loading from JSON.
        self.scales = list(scales)
        self.levels = None if levels is None else [list(level) for level in levels]

    @property
    def scale_schedules(self) -> ScaleSchedules:
        return schedules_of(self)

    @property
    def max_frames(self) -> int:
        """How many frames of a video file are read, see `max_frames_of_level`."""
        return max_frames_of_level(self.level or self.scale_schedules.resolutions[-1])

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The values that the darkest and the brightest pixels get by default."""
        ends = np.array([[0.0], [255.0]]) * (self.rescale_factor if self.do_rescale else 1)
        if self.do_normalize:
            ends = (ends - np.array(self.image_mean)) / np.array(self.image_std)
        return round(float(ends[0].min()), 4), round(float(ends[1].max()), 4)

    def schedule_for_grid(self, height: int, width: int) -> ScaleSchedule:
        """The schedule of an image whose final grid, a row of `image_grids`, is (height, width)."""
        return self.scale_schedules.for_size(int(height) * self.patch_size, int(width) * self.patch_size)

    def schedule_of(self, height: int, width: int) -> ScaleSchedule:
        """The schedule of an image of `height` x `width` pixels, to whose size it is resized."""
        return _schedule(self.scale_schedules, height, width, self.do_resize, self.level)

    def preprocess(self, images, **kwargs: Unpack[NextFlowImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: one image, a list of them, or a list per row of the batch.

        Returns:
            `pixel_values` (num_images, 3, height, width) float32 in [-1, 1], smaller images padded with 0 on the
            right and at the bottom; `image_grids` (num_images, 2) int64, the final grid (height, width) of each.

        Raises:
            ValueError: for an image that cannot be read, whose aspect ratio is outside 1:4 to 4:1, whose values are
                outside their range, or with settings of scale that do not fit its kind of values; the message names the
                image by its place in the list.
        """
        _check_settings(kwargs)
        # The library does not accept whole numbers there.
        means = {name: tuple(map(float, kwargs[name])) for name in ("image_mean", "image_std") if kwargs.get(name)}
        return super().preprocess(images, **kwargs | means)

    def fetch_images(self, images):
        """Read those of `images` that are no arrays, with `read_image`. Arrays get three axes, which the library's
        processors expect: those with four axes become lists, and grey images get an axis of channels.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(entry) for entry in images]
        if not _is_array(images):
            try:
                return read_image(images)
            except ValueError as error:
                raise ValueError(f"An image cannot be read: {error}") from error
        axes = images.ndim
        if axes not in (2, 3, 4):
            raise ValueError(f"An image is an array or a tensor with 2 or 3 axes, got {short_repr(images)}.")
        if axes == 2:
            return images[None] if is_torch_tensor(images) else images[..., None]
        return list(images) if axes == 4 else images

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """One image of any kind as (3, height, width) uint8."""
        image = _as_upright_pil(image, input_data_format)
        if not do_convert_rgb and image.mode != "RGB":
            raise ValueError(f"its mode is {image.mode!r}, not 'RGB'; leave do_convert_rgb on.")
        return np.ascontiguousarray(np.moveaxis(np.asarray(_to_rgb(image)), -1, 0))

    def to_rgb(self, images) -> list[Image.Image]:
        """Turn images of any kind that `preprocess` takes into PIL images in RGB; their size is kept.

        Raises:
            ValueError: for an image that cannot be read; the message names it by its place in the list.
        """
        arrays = self._prepare_image_like_inputs(images, do_convert_rgb=True)
        return [Image.fromarray(np.moveaxis(array, 0, -1)) for array in arrays]

    def preprocess_mask(self, mask, image: Image.Image) -> np.ndarray:
        """The mask of a region of an image, resized to the image's size in the model.

        Args:
            mask: one image of the size of `image`, light (above one half) where the region is.
            image: the image as it was given.

        Returns:
            (height, width) bool.

        Raises:
            ValueError: for several masks, a mask of another size, one with transparent pixels, or one that marks
                nothing.
        """
        masks = flatten_images(mask)
        shape = getattr(masks[0], "shape", ()) if masks else ()
        # Two channels would be grey and alpha, but are two masks.
        if len(masks) != 1 or (len(shape) == 3 and 2 in (shape[0], shape[2])):
            raise ValueError(f"A mask is one image, got {short_repr(mask)}; give one for each prompt.")
        if _is_transparent(*self._prepare_images_structure(masks)):
            # Some programs mark by holes, others by white paint on nothing; on white, both would mark everything.
            raise ValueError(
                "The mask has transparent pixels, which do not say where to draw; save it without an alpha channel, "
                "light where the image is to be drawn and dark elsewhere."
            )
        mask = ImageOps.grayscale(self.to_rgb(masks)[0])
        if mask.size != image.size:
            raise ValueError(
                f"The mask has {mask.width}x{mask.height} pixels, its image {image.width}x{image.height}; make them "
                "of one size."
            )
        height, width = self.schedule_of(image.height, image.width).image_size(self.patch_size)
        marked = np.asarray(mask)[None] > 127
        region = self._cover(255 * marked.astype(np.uint8), height, width, PILImageResampling.NEAREST)[0] > 127
        if not region.any():
            raise ValueError(
                "The mask marks no pixels; make it bright (above 127 of 255) where the image is to be drawn."
            )
        return region

    def postprocess(self, images, output_type: str = "pil") -> list:
        """Turn (3, height, width) tensors in [-1, 1] into a list of images.

        Args:
            images: tensors of any float type, or one tensor (num_images, 3, height, width).
            output_type: "pil", "np" (height, width, 3) float32 in [0, 1], or "pt" (3, height, width) float32 in [0, 1].

        Raises:
            ValueError: for another `output_type`.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        tensors = [(image.detach().float() / 2 + 0.5).clamp(0, 1) for image in images]
        if output_type == "pt":
            return tensors
        arrays = [tensor.permute(1, 2, 0).cpu().numpy() for tensor in tensors]
        if output_type == "np":
            return arrays
        return [Image.fromarray((array * 255).round().astype(np.uint8)) for array in arrays]

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        # The library's version prints an array that it refuses, and refuses grey images without an axis of channels.
        found = []
        for index, image in enumerate(flatten_images(images)):
            try:
                found.append(image if _is_array(image) else read_image(image))
            except ValueError as error:
                raise ValueError(f"Image {index} cannot be read: {error}") from error
        return found

    def _preprocess_image_like_inputs(self, images, *args, **kwargs) -> BatchFeature:
        images = self._prepare_images_structure(images)
        holds_floats = [_holds_floats(image) for image in images]
        # pyrefly: ignore[unexpected-keyword]
        return super()._preprocess_image_like_inputs(images, *args, holds_floats=holds_floats, **kwargs)

    def _prepare_image_like_inputs(self, images, *args, **kwargs) -> list[np.ndarray]:
        arrays = []
        for index, image in enumerate(self._prepare_images_structure(images)):
            try:
                arrays.append(self.process_image(image, *args, **kwargs))
            except Exception as error:  # the orientation that a file states is read here
                name = f"{index} ({image.filename})" if getattr(image, "filename", "") else str(index)
                raise ValueError(f"Image {name} cannot be read: {error}") from error
        return arrays

    def _preprocess(
        self, images, do_resize, level, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std,
        holds_floats, return_tensors=None, **kwargs,
    ) -> BatchFeature:  # fmt: skip
        if not images:
            raise ValueError("There is no image in the list; pass images=None for text without images.")
        schedules, processed, grids = self.scale_schedules, [], []
        for index, (image, is_float) in enumerate(zip(images, holds_floats)):
            try:
                factor = _rescale_factor(is_float, do_rescale, rescale_factor)
                if do_normalize:
                    _check_units(255 * factor, image_mean, image_std)
            except ValueError as error:
                raise ValueError(f"Image {index} cannot be used: {error}") from error
            try:
                schedule = _schedule(schedules, *image.shape[-2:], do_resize, level)
            except ValueError as error:
                raise ValueError(f"Image {index} cannot be used: {error} Crop or pad it first.") from error
            image = self._cover(image, *schedule.image_size(self.patch_size), resample)
            if factor != 1:
                image = self.rescale(image, factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image.astype(np.float32))
            grids.append(schedule.final_grid)
        data = {"pixel_values": np.stack(self.pad(processed)), "image_grids": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _cover(self, image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
        """Resize a (3, h, w) image, aspect ratio kept, until it covers the size, and crop the centre."""
        scale = max(height / image.shape[-2], width / image.shape[-1])
        covering = (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale)))
        if covering != image.shape[-2:]:
            image = self.resize(image, SizeDict(height=covering[0], width=covering[1]), resample)
        top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
        return image[:, top : top + height, left : left + width]

    def _validate_preprocess_kwargs(self, do_resize=None, **kwargs):
        # The library requires a `size` with `do_resize`; here the schedules decide the size.
        super()._validate_preprocess_kwargs(**kwargs)


def _check_settings(given: Mapping):
    """Raises `ValueError` for unknown names of settings, with the nearest known one, and for invalid values."""
    check_names(given, IMAGE_SETTINGS, "The image processor")
    check_types(given, IMAGE_SETTINGS, "The image processor")
    for name in ("image_mean", "image_std"):
        value = given.get(name)
        if value is not None and (len(value) != 3 or not all(map(math.isfinite, value))):
            raise ValueError(f"{name} holds a finite number for each of red, green and blue, got {short_repr(value)}.")
    if (resample := given.get("resample")) is not None and resample not in list(PILImageResampling):
        known = ", ".join(f"{one.value} ({one.name.lower()})" for one in PILImageResampling)
        raise ValueError(f"resample must be one of {known}, got {short_repr(resample)}.")


def flatten_images(images) -> list:
    """Single images in order, of any nesting of lists; an array or a tensor with four axes is a list of images."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [image for entry in images for image in flatten_images(entry)]
    return [images]


def _is_array(image) -> bool:
    return hasattr(image, "ndim") and not isinstance(image, memoryview)


def _holds_floats(image) -> bool:
    if isinstance(image, Image.Image):
        return image.mode == "F"
    return image.is_floating_point() if is_torch_tensor(image) else getattr(image, "dtype", np.dtype("u1")).kind == "f"


def _rescale_factor(is_float: bool, do_rescale: bool, rescale_factor: float) -> float:
    """The factor for an image's 8-bit values; for an image given as floats it restores the floats."""
    if not is_float:
        return rescale_factor if do_rescale else 1
    if do_rescale and not math.isclose(rescale_factor, RESCALE_FACTOR):
        raise ValueError(
            f"it holds floats in [0, 1], for which there is no rescale_factor of {rescale_factor}; use "
            "do_rescale=False, or give 8-bit values."
        )
    return RESCALE_FACTOR


def _check_units(highest: float, mean: Sequence[float], std: Sequence[float]):
    """Raises `ValueError` where means and deviations are in another unit than values from 0 to `highest`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = (np.array([[0.0], [highest]]) - np.asarray(mean)) / np.asarray(std)
        fits = np.abs(ends).max() <= LARGEST_NORMALIZED and (ends[1] - ends[0]).min() >= SMALLEST_RANGE
    if not fits:
        raise ValueError(
            f"its values from 0 to {highest:g} would be normalised to {ends.min():g} to {ends.max():g} by image_mean "
            f"{mean} and image_std {std}; 8-bit values take do_rescale=True and a rescale_factor of 1/255, and "
            "do_rescale=False is for floats in [0, 1]."
        )


def _schedule(schedules: ScaleSchedules, height: int, width: int, do_resize: bool, level: int | None) -> ScaleSchedule:
    if do_resize:
        height, width = schedules.nearest(height, width, level).image_size(schedules.patch_size)
    # Several base ratios may end on one grid; `image_grids` holds only the grid, from which `for_size` finds a
    # schedule.
    return schedules.for_size(height, width)


def _as_upright_pil(image, input_data_format: str | None = None) -> Image.Image:
    """An image of any kind as one of PIL of 8 bits, in the orientation that its file states."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            return Image.fromarray(_as_uint8(np.asarray(image)))
        if image.mode in SIXTEEN_BIT_MODES:
            return Image.fromarray(_as_uint8(_as_uint16(np.asarray(image))))
        return image
    channels_first = is_torch_tensor(image) if input_data_format is None else "first" in str(input_data_format)
    if is_torch_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    return _array_to_pil(image, channels_first, strict=input_data_format is not None)


def _is_transparent(image) -> bool:
    """Whether an image of any kind has pixels that are not opaque."""
    if not isinstance(image, Image.Image):
        if 4 not in (image.shape[0], image.shape[-1]):
            return False
        image = _as_upright_pil(image)
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray, channels_first: bool, strict: bool) -> Image.Image:
    """An array with 1, 2, 3 or 4 channels, or two axes of grey, as an image of 8 bits.

    `channels_first` decides when both ends could be channels; if `strict` it decides always.
    """
    if array.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(_as_uint8(array)))
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} does not have 2 or 3 axes, (height, width) and channels.")
    first, last = array.shape[0] in (1, 2, 3, 4), array.shape[-1] in (1, 2, 3, 4)
    if not strict and first != last:
        channels_first = first
    if not (first if channels_first else last):
        raise ValueError(f"an array of shape {array.shape} has no axis of 1 to 4 channels where it should be.")
    array = np.moveaxis(array, 0, -1) if channels_first else array
    array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_as_uint8(array)))


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{array.dtype} values are not pixel values; give uint8, or floats in [0, 1].")
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    is_float = np.issubdtype(array.dtype, np.floating)
    highest = 1 if is_float or array.dtype == bool else 255
    # `not all` rather than `any`: NaN is refused as well.
    if not ((array >= 0) & (array <= highest)).all():
        low, high = array.min(), array.max()
        raise ValueError(
            f"{array.dtype} values go from {low} to {high}; give {'floats in [0, 1]' if is_float else 'uint8'}."
        )
    return (np.rint(array * 255.0) if highest == 1 else array).astype(np.uint8)


def _as_uint16(array: np.ndarray) -> np.ndarray:
    # PIL holds 16-bit grey images as 32-bit integers in mode "I".
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"its values go from {array.min()} to {array.max()}, beyond 16 bits.")
    return array.astype(np.uint16)
