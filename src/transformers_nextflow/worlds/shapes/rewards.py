"""The shapes world's exact checker as a reward, and questions whose answers follow from a prompt of that world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from . import World, check, parse_caption, read
from .language import article, plural


WORLD = World()
Question = tuple[str, str]


def shapes_reward(prompts: Sequence[str], completions: Sequence[Image.Image], **_) -> list[float | None]:
    """1 for an image that holds only what its prompt asks for, a half if it holds more; `None` for a prompt that is no
    caption of the world.
    """
    rewards: list[float | None] = []
    for prompt, image in zip(prompts, completions):
        try:
            requirement = parse_caption(prompt, WORLD)
        except ValueError:
            rewards.append(None)
            continue
        result = check(read(image, WORLD), requirement)
        rewards.append((result.lenient + result.strict) / 2)
    return rewards


def ask_about_shapes(prompt: str) -> list[Question]:
    """Questions with the answers that an image drawn from a caption of the shapes world must give, in the wordings
    that the world's models were trained on. Relations are not asked for: their answers begin with places, of which many
    are right.

    Raises:
        ValueError: for a prompt that is no caption of the world.
    """
    asked = parse_caption(prompt, WORLD)
    questions = [("how many objects are there?", str(asked.num_objects))]
    shapes, colors = Counter(), Counter()
    for item in asked.items:
        shapes[item.shape] += item.count
        colors[item.color] += item.count
        if item.color is not None:
            questions.append((f"is there {article(item.color)} {item.color} {item.shape}?", "yes"))
        if item.cell is not None:
            questions.append((f"what shape is in row {item.cell[0] + 1} column {item.cell[1] + 1}?", item.shape))
    questions += [(f"how many {plural(shape)} are there?", str(count)) for shape, count in shapes.items()]
    if None not in colors:
        questions += [(f"how many {color} objects are there?", str(count)) for color, count in colors.items()]
    if asked.background is not None:
        questions.append(("what color is the background?", asked.background))
    return questions
