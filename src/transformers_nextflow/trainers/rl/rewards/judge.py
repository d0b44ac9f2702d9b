"""A reward by a model that answers a question about the image with yes or no."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


QUESTION = "Does this image show {prompt}? Answer yes or no."


def judge_reward(
    model: nn.Module, processor, question: str = QUESTION, answers: tuple[str, str] = ("yes", "no")
) -> Callable:
    """The probability of "yes", against "no", as a model's answer to whether an image shows its prompt.

    Args:
        model: any image-text-to-text model of transformers.
        processor: the model's own; its chat template takes one image and the question.
        question: the question, with `{prompt}`; it may also contain columns of the dataset in braces.
        answers: the two words whose first tokens are compared.

    Raises:
        ValueError: if the two words begin with the same token.
    """
    yes, no = (processor.tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers)
    if yes == no:
        raise ValueError(f"The answers {answers} begin with the same token {yes}; choose two that differ at once.")
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def judge(prompts, completions, **columns) -> list[float]:
        rows = {name: values for name, values in columns.items() if isinstance(values, list)}
        texts = []
        for index, prompt in enumerate(prompts):
            asked = question.format(prompt=prompt, **{name: values[index] for name, values in rows.items()})
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            texts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        inputs = processor(
            text=texts, images=[[image] for image in completions], padding=True, padding_side="left",
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return (logits[:, yes] - logits[:, no]).sigmoid().tolist()

    return judge
