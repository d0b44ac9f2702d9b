"""A short report of what a converted model does with a fixed set of inputs, to be posted for released weights."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoModel

from ..evaluation.image_metrics import psnr
from ..utils.checkpoint_checks import read_json
from .checkpoints import ShardedCheckpoint


PROMPTS = ("A red circle on a white table.", "A lighthouse on a cliff at dawn, photograph.")
INSTRUCTION, QUESTION = "Make the circle blue.", "What is in the image?"
TOKENIZERS = ("nextflow_vq", "bitwise_vq")


def fixed_image(side: int) -> Image.Image:
    """A red circle on a gradient, the same on every machine."""
    ramp = np.linspace(64, 192, side, dtype=np.uint8)
    image = Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), -1))
    ImageDraw.Draw(image).ellipse([side // 4, side // 4, 3 * side // 4, 3 * side // 4], fill="red")
    return image


def verify(folder: Path, device: str | None = None, dtype: torch.dtype | None = None, steps: int = 32) -> str:
    """Load a converted folder, draw and read a fixed set of inputs, and report the results.

    The conversion has checked keys, shapes and values, and loading refuses missing names. Images go to
    `FOLDER-verified`, where the report is `report.txt`.

    Args:
        folder: the folder that a converter has written.
        device: default: the GPU if there is one.
        dtype: default: bfloat16 on a GPU, else the folder's own.
        steps: the largest number of tokens to write.

    Raises:
        ValueError: for a folder without a model of this package, and values that are not finite.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else "auto")
    target = folder.with_name(f"{folder.name}-verified")
    target.mkdir(exist_ok=True)
    model_type = read_json(folder / "config.json").get("model_type")
    run = _tokenizer_lines if model_type in TOKENIZERS else _model_lines
    lines = [*_file_lines(folder, model_type), f"on {device} as {str(dtype).removeprefix('torch.')}"]
    lines += run(folder, device, dtype, target, steps)
    report = "\n".join(lines)
    (target / "report.txt").write_text(report + "\n", encoding="utf-8")
    return report


def _file_lines(folder: Path, model_type: str | None) -> list[str]:
    layout = ShardedCheckpoint(folder).layout
    count, kinds = sum(tensor.numel() for tensor in layout.values()), sorted({str(t.dtype) for t in layout.values()})
    names = hashlib.sha256("\n".join(f"{k} {tuple(t.shape)}" for k, t in sorted(layout.items())).encode()).hexdigest()
    return [
        f"{model_type}: {len(layout)} tensors, {count} parameters, {', '.join(kinds)}; names and shapes {names[:12]}",
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    ]


def _tokenizer_lines(folder: Path, device: str, dtype, target: Path, steps: int) -> list[str]:
    model = AutoModel.from_pretrained(folder).to(device).eval()
    image = fixed_image(getattr(model.config, "image_size", None) or model.config.scale_schedules.resolutions[0])
    return [_round_trip(model, image, target)]


@torch.no_grad()
def _round_trip(vq_model, image: Image.Image, target: Path) -> str:
    values = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    values = values.to(vq_model.device)
    codes, started = vq_model.encode(values).image_tokens, time.perf_counter()
    decoded = vq_model.decode(codes, vq_model.schedule_of(values)).float()
    _check_finite(decoded, "the decoded image")
    _to_image(decoded[0]).save(target / "read_and_written.png")
    reached = psnr(decoded / 2 + 0.5, values / 2 + 0.5).item()
    return (
        f"tokenizer: {image.width}x{image.height} pixels in {codes.shape[1]} codes {_hashed(codes)}, "
        f"{reached:.2f} dB, decoded in {time.perf_counter() - started:.1f} s"
    )


def _model_lines(folder: Path, device: str, dtype, target: Path, steps: int) -> list[str]:
    from ..pipeline_nextflow import NextFlowPipeline  # diffusers is an extra

    pipe = NextFlowPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    schedules = pipe.model.config.vq_config.scale_schedules
    only = getattr(pipe.model.config.vq_config, "image_size", None)
    lines, image = [], fixed_image(only or schedules.resolutions[0])
    calls = [(prompt, size, {}) for prompt in PROMPTS for size in schedules.resolutions]
    if hasattr(pipe.processor, "caption_request"):
        calls.append((INSTRUCTION, image.width, {"image": image}))
    for number, (prompt, size, options) in enumerate(calls):
        started = time.perf_counter()
        output = pipe(prompt, height=size, width=size, generator=torch.Generator().manual_seed(0), **options)
        taken = time.perf_counter() - started
        output.images[0].save(target / f"{number}.png")
        spread = np.asarray(output.images[0], dtype=np.float64).std()
        kind = "edited" if options else "drawn"
        lines.append(
            f"{kind} {number}.png: {prompt!r}, {size}x{size}, codes {_hashed(output.image_tokens)}, "
            f"spread of pixels {spread:.1f}, {taken:.1f} s"
        )
    if hasattr(pipe.processor, "caption_request"):
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        options = {"max_images": 0, "max_new_tokens": steps, "do_sample": False}
        answer = pipe.chat([{"role": "user", "content": content}], **options)["content"]
        lines.append(f"asked {QUESTION!r}, answers {''.join(part['text'] for part in answer)!r}")
    lines.append(_round_trip(pipe.model.vq_model, image, target))
    if device == "cuda":
        lines.append(f"most memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return lines


def _hashed(codes: torch.Tensor) -> str:
    return hashlib.sha256(codes.cpu().numpy().tobytes()).hexdigest()[:12]


def _check_finite(values: torch.Tensor, what: str):
    if not bool(values.isfinite().all()):
        raise ValueError(f"There are values that are not finite in {what}; convert again, and report it if they stay.")


def _to_image(pixels: torch.Tensor) -> Image.Image:
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    return Image.fromarray(values.to(torch.uint8).cpu().numpy())
