"""Videos as lists of frames: read from files, written to files, put into conversations frame by frame."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from .utils.atomic_files import write_with_fallback
from .utils.image_files import check_pixels, regular_file
from .utils.output_files import check_output_file
from .utils.short_repr import short_path, short_repr


Video = Sequence[Image.Image] | str | os.PathLike
# The limit for all frames of a file together: 3 GiB, since they are in memory at once.
MAX_PIXELS = 2**30
# Files that ffmpeg reads; others are images of several frames.
FFMPEG_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# The time between the frames that are read from longer files (paper, section 5.4).
SECONDS_APART = 2.0
# The duration of a GIF's frame that states none.
GIF_SECONDS = 0.1


def frame_times(duration: float, most: int) -> list[float]:
    """The times in seconds of the frames that are read from a video of `duration` seconds: every two seconds, or if
    these are more than `most` frames, evenly over the whole video.
    """
    apart = max(SECONDS_APART, duration / most)
    return [number * apart for number in range(min(most, max(1, math.ceil(duration / apart - 1e-9))))]


def read_frames(video: Video, max_frames: int | None = None) -> list[Image.Image]:
    """The frames of a video, all of one size.

    Args:
        video: images; or the path of a GIF, or of an MP4, MOV, MKV, WebM or AVI, which need the extra `video`.
        max_frames: a file that has more frames is sampled at the times of `frame_times`, without keeping the others in
            memory. Default: all frames. All given images are kept.

    Raises:
        ValueError: for a file that cannot be read, a video without frames, and frames of different sizes.
        ImportError: for an MP4 without the extra.
    """
    if isinstance(video, str | os.PathLike):
        frames = _read_file(Path(video), max_frames)
    elif isinstance(video, Sequence) and not isinstance(video, bytes | bytearray | memoryview):
        frames = list(video)
    elif getattr(video, "ndim", 0) == 4:
        frames = list(video)
    else:
        raise ValueError(f"A video is a list of images, or the path of a file, got {short_repr(video)}.")
    if not frames:
        raise ValueError("A video needs at least one frame, got none.")
    if missing := [number for number, frame in enumerate(frames) if frame is None]:
        raise ValueError(f"Frame {missing[0]} of a video is None; give an image, or leave it out.")
    sizes = {getattr(frame, "size", None) if isinstance(frame, Image.Image) else np.shape(frame) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"All frames of a video have one size, got {sorted(map(str, sizes))}; resize them first.")
    return frames


def write_frames(frames: Sequence[Image.Image], path: str | os.PathLike, frames_per_second: float = 2.0):
    """Write frames as a GIF, or as an MP4, which needs the extra `video`; every frame of the list is one of the file.

    Args:
        frames: images of one size.
        frames_per_second: in a GIF the duration of a frame is rounded to hundredths of a second.

    Raises:
        ValueError: for another extension, no frames, and a rate that the format does not support.
        ImportError: for an MP4 without the extra.
    """
    path, frames = Path(path), read_frames(frames)
    check_video_path(path)
    if not 0.01 <= frames_per_second <= 100:
        raise ValueError(f"frames_per_second goes from 0.01 to 100, got {frames_per_second}.")
    if path.suffix.lower() == ".gif":
        first, *others = _without_repetitions([_of_full_colour(frame) for frame in frames])
        duration = 10 * round(100 / frames_per_second)
        options = {"save_all": True, "append_images": others, "duration": duration, "loop": 0}
        write_with_fallback(path, lambda partial: first.save(partial, **options))
    else:
        # With the default blocks of 16 pixels the encoder would resize small images.
        arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
        options = {"fps": frames_per_second, "macro_block_size": 1}
        write_with_fallback(path, lambda partial: _imageio().mimwrite(partial, arrays, **options))


def _without_repetitions(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames that show the same GIF, none of them equal to the frame before: Pillow would leave out such a frame.

    A repeated frame becomes a fully transparent one, through which the frame before is visible.
    """
    clear, written = Image.new("RGBA", frames[0].size), []
    shown = [frame.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGBA").tobytes() for frame in frames]
    for number, frame in enumerate(frames):
        is_repeated = number > 0 and shown[number] == shown[number - 1] and written[-1] is not clear
        written.append(clear if is_repeated else frame)
    return written


def check_video_path(path: str | os.PathLike):
    """Raises the errors of `write_frames` for a path, before there are frames."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"Videos are written as .gif or .mp4, got {short_path(Path(path).name)}.")
    check_output_file(path)
    if suffix == ".mp4":
        _imageio()


def expand_videos(conversation: Sequence, max_frames: int | None = None) -> list:
    """Messages, or a batch of them, with every video replaced by its frames, at most `max_frames` of a file; other
    parts are unchanged.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(f"A conversation is a list of messages with role and content, got {short_repr(conversation)}.")
    return [
        _expand(entry, max_frames) if isinstance(entry, dict) else expand_videos(entry, max_frames)
        for entry in conversation
    ]


def _expand(message: dict, max_frames: int | None) -> dict:
    content = message.get("content")
    if not isinstance(content, list | tuple) or all("video" not in part for part in content if isinstance(part, dict)):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and "video" in part:
            parts += [{"type": "image", "image": frame} for frame in read_frames(part["video"], max_frames)]
        else:
            parts.append(part)
    return {**message, "content": parts}


def _read_file(path: Path, max_frames: int | None) -> list[Image.Image]:
    regular_file(path, "video")
    frames, pixels = [], 0
    try:
        for frame in _frames_of(path, max_frames):
            check_pixels(*frame.size, f"A frame of {path}")
            pixels += frame.width * frame.height
            if pixels > MAX_PIXELS:
                raise ValueError(f"its frames have more than {MAX_PIXELS} pixels together; cut it, or make it smaller.")
            frames.append(frame)
    except ImportError:
        raise
    except Exception as error:  # decoders of broken files raise what comes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        # ffmpeg says what it is and all that it does, and in the last line what is wrong.
        raise ValueError(f"{path} cannot be read as a video: {reason[-1]}") from error
    return frames


def _frames_of(path: Path, max_frames: int | None) -> Iterator[Image.Image]:
    if path.suffix.lower() in FFMPEG_SUFFIXES:
        yield from map(Image.fromarray, _frames_by_ffmpeg(path, max_frames))
        return
    with Image.open(path) as video:
        check_pixels(*video.size, f"A frame of {path}")
        count = getattr(video, "n_frames", 1)
        chosen = range(count) if max_frames is None or count <= max_frames else _numbers_in(video, max_frames)
        for number in chosen:
            video.seek(number)
            # The image processor decides what becomes of transparency.
            yield _of_full_colour(video)


def _frames_by_ffmpeg(path: Path, max_frames: int | None) -> Iterator[np.ndarray]:
    with _imageio().get_reader(path) as video:
        if max_frames is None or video.count_frames() <= max_frames:
            yield from video.iter_data()
            return
        facts = video.get_meta_data()
    for time in frame_times(facts["duration"], max_frames):
        # ffmpeg seeks to that time without decoding what comes before, and gives the first frame that begins after it.
        before = max(0.0, (math.floor(time * facts["fps"] + 1e-6) - 0.5) / facts["fps"])
        with _imageio().get_reader(path, input_params=["-ss", f"{before:.3f}"]) as video:
            yield next(video.iter_data())


def _numbers_in(video: Image.Image, most: int) -> list[int]:
    """The numbers of the frames that are shown at the times of `frame_times`."""
    shown = [(frame.info.get("duration") or 1000 * GIF_SECONDS) / 1000 for frame in ImageSequence.Iterator(video)]
    ends = list(accumulate(shown))
    return [bisect_right(ends, time + 1e-6) for time in frame_times(ends[-1], most)]


def _of_full_colour(frame: Image.Image) -> Image.Image:
    return frame.convert("RGBA" if frame.has_transparency_data else "RGB")


def _imageio():
    try:
        import imageio.v2
    except ImportError as error:
        raise ImportError("MP4 files need imageio: pip install transformers-nextflow[video]") from error
    return imageio.v2
