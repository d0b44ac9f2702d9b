"""A judge as a reward, with another seed than the judge that scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from .judge import Judge
from .requirement import Requirement, check


def judge_reward(judge: Judge) -> Callable[..., list[float]]:
    """A reward for `NextFlowGRPOTrainer`: the mean of all that `requirement.check` scores of an image.

    The rows have a column `requirement` with the requirement of their prompt (`Requirement.to_json`).
    """

    def emoji_reward(
        prompts: Sequence[str], completions: Sequence[Image.Image], requirement: Sequence[str], **_
    ) -> list[float]:
        rewards = []
        for scene, asked in zip(judge.read(completions), requirement):
            score = check(scene, Requirement.from_json(asked))
            rewards.append(sum(score.values()) / len(score))
        return rewards

    return emoji_reward
