"""TokenFlow-t2i: text to image on Llama-2, NextFlow's nearest relative with public weights (arXiv 2412.03069)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel, PreTrainedModel  # noqa: F401 - diffusers looks for it beside a component's class
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..modeling_nextflow import NextFlowPreTrainedModel
from ..modeling_nextflow_vq import frozen_vision_tokenizer
from ..sequence.layout import check_num_positions
from ..sequence.padding import check_left_padded
from ..sequence.scale_sdpa import ScaleAttentionMixin, ScaleMaskedMixin
from ..utils.offloading import onload_weights
from ..utils.older_transformers import CACHE_KEYWORD, accepts_cache_keyword
from ..vision_tokenizer.resampling import resample
from .configuration_tokenflow_t2i import TokenFlowT2IConfig
from .generation_tokenflow_t2i import TokenFlowT2IDrawingMixin


class TokenFlowT2IAttention(ScaleAttentionMixin, Qwen3Attention):
    """Llama's attention with a norm for each head of queries and keys before they are rotated."""


class TokenFlowT2IDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with norms on the outputs of attention and MLP, and on queries and keys.

    The norms keep Llama's names, as in the released checkpoint: `input_layernorm` comes after attention,
    `post_attention_layernorm` after the MLP.
    """

    def __init__(self, config, layer_idx: int, qk_norm_eps: float):
        super().__init__(config, layer_idx)
        self.self_attn = TokenFlowT2IAttention(config, layer_idx)
        for norm in (self.self_attn.q_norm, self.self_attn.k_norm):
            norm.variance_epsilon = qk_norm_eps

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.input_layernorm(attended)
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class TokenFlowT2ITextModel(ScaleMaskedMixin, LlamaModel):
    """The backbone; takes embeddings, positions and prepared masks, as the backbone of NextFlow does."""

    _no_split_modules = ["TokenFlowT2IDecoderLayer"]
    _can_record_outputs = {"hidden_states": TokenFlowT2IDecoderLayer, "attentions": Qwen3Attention}

    def __init__(self, config, qk_norm_eps: float):
        super().__init__(config)
        self.layers = nn.ModuleList(
            TokenFlowT2IDecoderLayer(config, index, qk_norm_eps) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    @accepts_cache_keyword
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: dict,
        position_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds: (B, L, D).
            attention_mask: `{"full_attention": mask}`, prepared by transformers.
            position_ids: (B, L).
        """
        places = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        return self.through_layers(inputs_embeds, attention_mask, past_key_values, position_embeddings=places, **kwargs)


class TokenFlowT2IForConditionalGeneration(NextFlowPreTrainedModel, TokenFlowT2IDrawingMixin):
    """Reads a prompt and draws an image.

    An image of N codes follows its prompt. The prompt's last token predicts the code of the first scale; N - 1 slots,
    one position each, predict the others. The slots of scale k read the codes of all scales before it.
    """

    config: TokenFlowT2IConfig
    input_modalities = ("text",)
    card_title, card_pipeline_tag = "TokenFlow-t2i", "text-to-image"
    card_origin = "[arXiv 2412.03069](https://arxiv.org/abs/2412.03069)"
    _no_split_modules = ["TokenFlowT2IDecoderLayer", "NextFlowVQModel"]

    def __init__(self, config: TokenFlowT2IConfig):
        super().__init__(config)
        text_config, vq_config, schedule = config.text_config, config.vq_config, config.schedule
        hidden_size = text_config.hidden_size
        self.language_model = TokenFlowT2ITextModel._from_config(text_config, qk_norm_eps=config.qk_norm_eps)
        self.connector = nn.Sequential(
            nn.Linear(vq_config.code_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        # Row 0 is for text, row k for the slots of scale k; row 1 is not used, since that slot is a text token.
        self.scale_embedding = nn.Embedding(schedule.num_scales + 1, hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(schedule.num_tokens, hidden_size))
        self.lm_head = nn.Linear(hidden_size, text_config.vocab_size, bias=False)
        self.vq_model = frozen_vision_tokenizer(vq_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TokenFlowT2IForConditionalGeneration):
            init.normal_(module.position_embedding, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) of images (B, 3, H, W) in [-1, 1] of the model's size."""
        if tuple(pixel_values.shape[-2:]) != self.config.image_size:
            raise ValueError(
                f"TokenFlow-t2i has only images of {self.config.image_size} pixels, got "
                f"{tuple(pixel_values.shape[-2:])}."
            )
        return self.vq_model.encode(pixel_values).image_tokens

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Images, each (3, H, W) in [-1, 1], from codes (B, n) of all scales, or of the first ones (a preview).

        All images have one size; `image_grids` (B, 2) may say so.
        """
        grid = self.config.schedule.final_grid
        if image_grids is not None and set(map(tuple, image_grids.tolist())) != {grid}:
            raise ValueError(f"TokenFlow-t2i has only images with the final grid {grid}, got {image_grids.tolist()}.")
        return list(self.vq_model.decode(image_tokens, self.config.schedule))

    def visual_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The codes' part of the head: hidden states (…, D) → logits (…, codes)."""
        start = self.config.image_token_start
        with onload_weights([self.lm_head]):
            return F.linear(hidden_states, self.lm_head.weight[start : start + self.config.vq_config.codebook_size])

    def embed_prompts(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Prompts (B, L), left padded → embeddings (B, L, D); the last token is the first slot as well."""
        with onload_weights([self, self.scale_embedding]):
            embeds = self.language_model.embed_tokens(input_ids) + self.scale_embedding.weight[0]
            return torch.cat([embeds[:, :-1], embeds[:, -1:] + self.position_embedding[0]], dim=1)

    def embed_slots(self, image_tokens: torch.Tensor, scale: int, with_own_codes: bool = False) -> torch.Tensor:
        """Embeddings (B, h*w, D) of the slots of a scale, counted from 0, from codes (B, n) of the scales before it.

        With its own codes (in refinement) the codes of the scale itself are added.

        Raises:
            ValueError: for codes out of range or too few.
        """
        schedule, upsample = self.config.schedule, self.config.vq_config.upsample
        num_codes = schedule.offsets[scale + with_own_codes]
        vectors = self.vq_model.quantizer.lookup(image_tokens[:, :num_codes], schedule)
        # The sum has the size of each scale in turn, unlike the tokenizer's sum, which has the final size.
        total = vectors[0]
        for vector, grid in zip(vectors[1:], schedule.grids[1:]):
            total = resample(total, grid, upsample) + vector
        features = resample(total, schedule.grids[scale], upsample).flatten(2).transpose(1, 2)
        embeds = self.connector(features.to(self.scale_embedding.weight.dtype))
        with onload_weights([self, self.scale_embedding]):
            embeds = embeds + self.scale_embedding.weight[scale + 1]
            return embeds + self.position_embedding[schedule.offsets[scale] : schedule.offsets[scale + 1]]

    def read(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_tokens: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) of prompts, or (B, L + N - 1, D) of prompts with their whole images.

        Raises:
            ValueError: for prompts that are not padded on the left, codes that do not fit, and more positions than the
                model has.
        """
        schedule = self.config.schedule
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_left_padded(mask, "Prompts")
        position_ids, block_ids = (mask.cumsum(-1) - 1).clamp_min(0), None
        embeds = self.embed_prompts(input_ids)
        if image_tokens is not None:
            _check_codes(image_tokens, input_ids, schedule.num_tokens)
            embeds = torch.cat([embeds, *(self.embed_slots(image_tokens, k) for k in range(1, schedule.num_scales))], 1)
            places = torch.arange(1, schedule.num_tokens, device=input_ids.device)
            position_ids = torch.cat([position_ids, position_ids[:, -1:] + places], dim=1)
            mask = F.pad(mask, (0, len(places)), value=1)
            block_ids = torch.full_like(mask, -1)
            for scale, (start, stop) in enumerate(zip(schedule.offsets[1:], schedule.offsets[2:])):
                block_ids[:, input_ids.shape[1] - 1 + start : input_ids.shape[1] - 1 + stop] = scale
        check_num_positions(int(position_ids.max()) + 1, self.config)
        prepared = create_causal_mask(
            config=self.language_model.config,
            inputs_embeds=embeds,
            attention_mask=mask if attention_mask is not None else None,
            **{CACHE_KEYWORD: past_key_values},
            block_sequence_ids=block_ids,
        )
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": prepared},
            position_ids=position_ids,
            **{CACHE_KEYWORD: past_key_values},
            use_cache=use_cache,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_tokens: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One pass over prompts, with or without whole images after them.

        Args:
            input_ids: (B, L) prompts, left padded.
            attention_mask: (B, L).
            image_tokens: (B, N) codes, one image for each prompt.

        Returns:
            `logits` (B, L, V), or (B, L + N - 1, V) of which the last N predict the codes; V is the whole vocabulary,
            where code c is token `image_token_start + c`.

        Raises:
            ValueError: for prompts that are not padded on the left, and codes that do not fit.
        """
        outputs = self.read(input_ids, attention_mask, image_tokens, **kwargs)
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _check_codes(image_tokens: torch.Tensor, input_ids: torch.Tensor, num_tokens: int):
    expected = (len(input_ids), num_tokens)
    if tuple(image_tokens.shape) != expected:
        raise ValueError(
            f"image_tokens must be {expected}, all codes of one image for each prompt, got {tuple(image_tokens.shape)}."
        )
