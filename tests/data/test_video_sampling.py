"""Frames of video files as the paper samples them: two seconds apart, and few at high levels (section 5.4)."""

import numpy as np
import pytest
from PIL import Image
from test_trainer import conversation, text
from tiny import tiny_processor

from transformers_nextflow import NextFlowImageProcessor
from transformers_nextflow.data import read_row
from transformers_nextflow.scale_schedule import SQUARE_SIDES, max_frames_of_level
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.video_processing_nextflow import frame_times, read_frames, write_frames


LEVELS = ((256, 12), (512, 16), (1024, 18))


def write_video(path, seconds: int, rate: int = 2) -> list[int]:
    """A video whose frames become lighter by time; returns the lightness of each."""
    shades = [round(number * 250 / (seconds * rate)) for number in range(seconds * rate)]
    write_frames([Image.new("RGB", (16, 16), 3 * (shade,)) for shade in shades], path, frames_per_second=rate)
    return shades


def shades(frames) -> list[int]:
    return [int(np.asarray(frame.convert("L")).mean()) for frame in frames]


def test_frames_are_two_seconds_apart_or_spread_evenly_over_a_longer_video():
    assert frame_times(0.5, 5) == [0.0] and frame_times(2.0, 5) == [0.0]
    assert frame_times(5.0, 5) == [0.0, 2.0, 4.0]
    assert frame_times(10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert frame_times(60.0, 3) == [0.0, 20.0, 40.0]
    for duration in (0.1, 3.0, 9.99, 10.01, 3600.0):
        for most in (1, 3, 5, 20):
            times = frame_times(duration, most)
            assert 1 <= len(times) <= most and times[-1] < duration
            assert all(later - earlier >= 2 for earlier, later in zip(times, times[1:]))


def test_the_paper_says_how_many_frames_a_level_takes():
    assert [max_frames_of_level(level) for level in (1024, 512, 256, 16)] == [3, 5, 20, 20]
    processor = NextFlowImageProcessor(SQUARE_SIDES, 16, LEVELS)
    assert processor.max_frames == 3
    processor.level = 512
    assert processor.max_frames == 5


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_longer_file_is_sampled_at_these_times(suffix, tmp_path):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    written = write_video(tmp_path / f"video{suffix}", seconds=12)
    assert len(read_frames(tmp_path / f"video{suffix}")) == 24
    assert len(read_frames(tmp_path / f"video{suffix}", max_frames=24)) == 24
    for most, numbers in ((5, [0, 4, 9, 14, 19]), (3, [0, 8, 16]), (20, [0, 4, 8, 12, 16, 20])):
        found = shades(read_frames(tmp_path / f"video{suffix}", max_frames=most))
        assert found == pytest.approx([written[number] for number in numbers], abs=6)


def test_frames_of_unequal_length_are_taken_by_time(tmp_path):
    frames = [Image.new("RGB", (16, 16), 3 * (shade,)) for shade in (0, 60, 120, 180)]
    durations = [7000, 1000, 1000, 1000]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=durations)
    assert shades(read_frames(tmp_path / "video.gif", max_frames=3)) == pytest.approx([0, 0, 0], abs=2)
    assert shades(read_frames(tmp_path / "video.gif", max_frames=2)) == pytest.approx([0, 0], abs=2)


def test_a_list_of_frames_is_taken_as_it_is():
    frames = [Image.new("RGB", (16, 16)) for _ in range(30)]
    assert read_frames(frames, max_frames=3) == frames


def test_rows_and_conversations_read_few_frames_of_a_video_of_any_length(tmp_path):
    write_video(tmp_path / "video.gif", seconds=60)
    video = {"type": "video", "video": "video.gif"}
    row = {"messages": conversation([video, text("what happens?")], [text("one")])}
    assert read_row(row, tmp_path).num_images == 20
    processor = tiny_processor()
    assert NextFlowCollator(processor, root=tmp_path).encode(row)[0].count(processor.boi_token_id) == 20
    asked = [{"role": "user", "content": [{"type": "video", "video": str(tmp_path / "video.gif")}, text("what?")]}]
    ids = processor.apply_chat_template(asked, tokenize=True, return_dict=True)["input_ids"]
    assert np.asarray(ids).flatten().tolist().count(processor.boi_token_id) == 20
