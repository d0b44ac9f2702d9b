"""Videos as lists of frames: read from files, written to files, put into conversations frame by frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from .utils.atomic_files import write_whole


Video = Sequence[Image.Image] | str | os.PathLike


def read_frames(video: Video) -> list[Image.Image]:
    """The frames of a video, all of one size.

    Args:
        video: images; or the path of a GIF, or of an MP4, which needs the extra `video`.

    Raises:
        ValueError: for a file that cannot be read, a video without frames, and frames of different sizes.
        ImportError: for an MP4 without the extra.
    """
    if isinstance(video, str | os.PathLike):
        frames = _read_file(Path(video))
    else:
        frames = list(video)
    if not frames:
        raise ValueError("A video needs at least one frame, got none.")
    sizes = {getattr(frame, "size", None) if isinstance(frame, Image.Image) else np.shape(frame) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"All frames of a video have one size, got {sorted(map(str, sizes))}; resize them first.")
    return frames


def write_frames(frames: Sequence[Image.Image], path: str | os.PathLike, frames_per_second: float = 2.0):
    """Write frames as a GIF, or as an MP4, which needs the extra `video`; every frame of the list is one of the file.

    Args:
        frames: images of one size.
        frames_per_second: a GIF counts in hundredths of a second, to which a frame's time is rounded.

    Raises:
        ValueError: for another extension, no frames, and a rate that the format does not know.
        ImportError: for an MP4 without the extra.
    """
    path, frames = Path(path), read_frames(frames)
    check_video_path(path)
    if not 0.01 <= frames_per_second <= 100:
        raise ValueError(f"frames_per_second goes from 0.01 to 100, got {frames_per_second}.")
    if path.suffix.lower() == ".gif":
        first, *others = _without_repetitions([_of_full_colour(frame) for frame in frames])
        duration = 10 * round(100 / frames_per_second)
        with write_whole(path) as partial:
            first.save(partial, save_all=True, append_images=others, duration=duration, loop=0)
    else:
        # Blocks of 16 pixels would have the encoder resize small images.
        arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
        with write_whole(path) as partial:
            _imageio().mimwrite(partial, arrays, fps=frames_per_second, macro_block_size=1)


def _without_repetitions(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames that look the same as a GIF, none of them equal to the one before: Pillow would leave that one out.

    A frame that is repeated becomes one that is transparent all over, under which the one before stays.
    """
    clear, written = Image.new("RGBA", frames[0].size), []
    shown = [frame.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGBA").tobytes() for frame in frames]
    for number, frame in enumerate(frames):
        is_repeated = number > 0 and shown[number] == shown[number - 1] and written[-1] is not clear
        written.append(clear if is_repeated else frame)
    return written


def check_video_path(path: str | os.PathLike):
    """Raises what `write_frames` raises for a path, before there are frames."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"Videos are written as .gif or .mp4, got {Path(path).name}.")
    if suffix == ".mp4":
        _imageio()


def expand_videos(conversation: Sequence) -> list:
    """Messages, or a batch of them, with every video replaced by its frames; other parts are left alone."""
    return [_expand(entry) if isinstance(entry, dict) else expand_videos(entry) for entry in conversation]


def _expand(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, list | tuple) or all("video" not in part for part in content):
        return message
    parts = []
    for part in content:
        if "video" in part:
            parts += [{"type": "image", "image": frame} for frame in read_frames(part["video"])]
        else:
            parts.append(part)
    return {**message, "content": parts}


def _read_file(path: Path) -> list[Image.Image]:
    if not path.is_file():
        raise ValueError(f"There is no video {path}.")
    try:
        if path.suffix.lower() == ".mp4":
            return [Image.fromarray(frame) for frame in _imageio().mimread(path, memtest=False)]
        with Image.open(path) as video:
            # What transparency stands for is the image processor's to say.
            return [_of_full_colour(frame) for frame in ImageSequence.Iterator(video)]
    except (OSError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def _of_full_colour(frame: Image.Image) -> Image.Image:
    return frame.convert("RGBA" if frame.has_transparency_data else "RGB")


def _imageio():
    try:
        import imageio.v2
    except ImportError as error:
        raise ImportError("MP4 files need imageio: pip install transformers-nextflow[video]") from error
    return imageio.v2
