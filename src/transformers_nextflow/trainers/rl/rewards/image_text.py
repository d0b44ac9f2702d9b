"""Similarity of images and prompts by a model with an encoder for each of the two (CLIP score, PickScore, SigLIP)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ....utils.user_warnings import warn_user


@torch.no_grad()
def _scores(model: nn.Module, inputs: dict, scaled: bool) -> torch.Tensor:
    outputs = model(**inputs)
    text, image = (nn.functional.normalize(e.float(), dim=-1) for e in (outputs.text_embeds, outputs.image_embeds))
    cosines = (text * image).sum(-1)
    return cosines * model.logit_scale.exp() if scaled else cosines


def similarity_reward(model: nn.Module, processor, scaled: bool = False) -> Callable:
    """The cosine between the embeddings of an image and of its prompt.

    Args:
        model: any model of transformers with `text_embeds` and `image_embeds` in its output, such as
            `CLIPModel.from_pretrained("openai/clip-vit-large-patch14")` or `yuvalkirstain/PickScore_v1`.
        processor: the model's own. Prompts are padded to the length of its training, which SigLIP needs. Longer ones
            are cut off there, as is usual, with a warning.
        scaled: multiply by the model's temperature, as is usual for PickScore and HPSv2.
    """
    model.eval().requires_grad_(False)
    length = model.config.text_config.max_position_embeddings

    def similarity(prompts, completions, **_) -> list[float]:
        longest = max(len(ids) for ids in processor.tokenizer(list(prompts), verbose=False)["input_ids"])
        if longest > length:
            warn_user(
                f"similarity_reward: the model reads {length} tokens of a prompt, and a prompt has {longest}; what "
                "comes after them does not count. Shorten such prompts, or take a model that reads more.",
            )
        inputs = processor(
            text=list(prompts), images=list(completions), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        return _scores(model, inputs, scaled).tolist()

    return similarity
