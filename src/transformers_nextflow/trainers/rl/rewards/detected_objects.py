"""A reward by GenEval's rules with an object detector: which objects, how many, in which colours, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn


# The colours that GenEval's prompts name.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# Objects whose centres are closer than this share of both boxes' sizes have no relation.
MARGIN = 0.1


@dataclass(frozen=True)
class Detection:
    """An object in an image: its class, how sure the detector is, and its box (left, top, right, bottom) in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]


def relations(box: Sequence[float], reference: Sequence[float]) -> set[str]:
    """The `RELATIONS` of an object to another: two if it is placed diagonally, none if the centres nearly agree."""
    shifts = []
    for axis in (0, 1):
        shift = (box[axis] + box[axis + 2] - reference[axis] - reference[axis + 2]) / 2
        margin = MARGIN * (box[axis + 2] - box[axis] + reference[axis + 2] - reference[axis])
        shifts.append(max(abs(shift) - margin, 0) * (1 if shift > 0 else -1))
    across, down = shifts
    distance = (across**2 + down**2) ** 0.5
    sides = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, side in sides.items() if side > distance / 2}


def color_classifier(model: nn.Module, processor, template: str = "a photo of a {color} {label}") -> Callable:
    """`color_of(crops, label)` for [`geneval_reward`] by zero-shot classification.

    Args:
        model: a model with `logits_per_image` in its output, such as CLIP.
        processor: the processor of the model.
        template: the text for a colour, with `{color}` and `{label}`.
    """
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def color_of(crops: Sequence[Image.Image], label: str) -> list[str]:
        texts = [template.format(color=color, label=label) for color in COLORS]
        inputs = processor(text=texts, images=list(crops), padding=True, return_tensors="pt").to(model.device)
        return [COLORS[index] for index in model(**inputs).logits_per_image.argmax(-1).tolist()]

    return color_of


def geneval_reward(
    detector: nn.Module,
    image_processor,
    color_of: Callable[[Sequence[Image.Image], str], list[str]] | None = None,
    label_names: Mapping[str, str] | None = None,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
) -> Callable:
    """The share of a prompt's requirements that an image meets; 1 is what GenEval counts as correct.

    The dataset has the columns of GenEval's prompt files. `include` lists the objects that must be there: `class`,
    `count`, and optionally `color` and `position`, a relation of `RELATIONS` with the index of the other item.
    `exclude` lists counts that must not be reached.

    Args:
        detector: an object detection model of transformers, such as DETR or YOLOS.
        image_processor: the model's own.
        color_of: colours of cut-out objects of one class, see [`color_classifier`]; only prompts with colours need it.
        label_names: the detector's names for classes that have other names in the prompts.
        threshold: the lowest score of an object.
        counting_threshold: the same for prompts with `exclude`, in which one object too many is wrong.

    Raises:
        ValueError: for a prompt without requirements, a class that the detector does not know, an unknown relation or
            one without its other item, or a colour without `color_of`.
    """
    detector.eval().requires_grad_(False)
    names, known = dict(label_names or {}), set(detector.config.id2label.values())

    @torch.no_grad()
    def geneval(prompts, completions, include, exclude=None, **_) -> list[float]:
        images, excluded = list(completions), exclude or [None] * len(completions)
        for wanted, unwanted in zip(include, excluded):
            _check_items(wanted, unwanted or (), names, known, color_of)
        inputs = image_processor(images=images, return_tensors="pt").to(detector.device)
        found = image_processor.post_process_object_detection(
            detector(**inputs), threshold=threshold, target_sizes=[image.size[::-1] for image in images]
        )
        rewards = []
        for image, objects, wanted, unwanted in zip(images, found, include, excluded):
            detections = _detections(objects, detector.config.id2label, counting_threshold if unwanted else threshold)
            met = requirements_met(detections, wanted, unwanted or (), image, names, color_of)
            rewards.append(sum(met) / len(met))
        return rewards

    return geneval


def requirements_met(
    detections: Sequence[Detection],
    include: Sequence[Mapping],
    exclude: Sequence[Mapping],
    image: Image.Image,
    label_names: Mapping[str, str],
    color_of: Callable | None,
) -> list[bool]:
    """Whether the detections of its class with the highest scores meet each item of `include`, then of `exclude`."""

    def of_class(item) -> list[Detection]:
        label = label_names.get(item["class"], item["class"])
        return sorted((d for d in detections if d.label == label), key=lambda d: -d.score)

    def is_met(item) -> bool:
        chosen = of_class(item)[: item["count"]]
        if len(chosen) < item["count"]:
            return False
        if item.get("color"):
            crops = [_cut_out(image, detection.box) for detection in chosen]
            if any(color != item["color"] for color in color_of(crops, item["class"])):
                return False
        if item.get("position"):
            relation, index = item["position"]
            others = of_class(include[int(index)])[: include[int(index)]["count"]]
            return bool(others) and all(relation in relations(a.box, b.box) for a in chosen for b in others)
        return True

    return [is_met(item) for item in include] + [len(of_class(item)) < item["count"] for item in exclude]


def _detections(objects: Mapping, id2label: Mapping[int, str], threshold: float) -> list[Detection]:
    columns = (objects[name].tolist() for name in ("labels", "scores", "boxes"))
    return [Detection(id2label[label], score, tuple(box)) for label, score, box in zip(*columns) if score >= threshold]


def _cut_out(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The part of an image in a box, clipped to the image and at least one pixel large."""
    left, top = (min(max(math.floor(low), 0), side - 1) for low, side in zip(box[:2], image.size))
    right, bottom = (min(math.ceil(high), side) for high, side in zip(box[2:], image.size))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _check_items(
    include: Sequence[Mapping] | None,
    exclude: Sequence[Mapping],
    names: Mapping[str, str],
    known: set[str],
    color_of: Callable | None,
):
    if not include:
        raise ValueError(f"A prompt requires nothing: its include is {include!r}; list what must be there.")
    for item in (*include, *exclude):
        label = names.get(item["class"], item["class"])
        if label not in known:
            raise ValueError(
                f"The detector knows no class {label!r}; give label_names={{{item['class']!r}: its own name}}, one of "
                f"{sorted(known)[:5]} …"
            )
        if item.get("color") and color_of is None:
            raise ValueError(f"A prompt asks for the color {item['color']!r}; give color_of, see color_classifier.")
        if item.get("position") and item["position"][0] not in RELATIONS:
            raise ValueError(f"position {item['position'][0]!r} is none of {', '.join(RELATIONS)}.")
        if item.get("position") and not 0 <= int(item["position"][1]) < len(include):
            raise ValueError(f"position {item['position']} refers to none of the {len(include)} items.")
