"""NextFlow: one decoder-only transformer over text tokens and images drawn scale by scale (paper, section 2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2_5_VLTextModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from transformers.utils import can_return_tuple

from .configuration_nextflow import NextFlowConfig
from .generation_nextflow import NextFlowGenerationMixin
from .modeling_nextflow_vq import NextFlowVQModel, frozen_vision_tokenizer, images_at_once
from .scale_schedule import ScaleSchedule
from .sequence.fused_cross_entropy import called_cross_entropy, fused_cross_entropy
from .sequence.layout import (
    SequenceLayout,
    check_num_positions,
    layout_batch,
    layout_sequence,
    num_codes_read,
    predictors_of,
    schedules_of,
    text_ids,
)
from .sequence.loss import (
    PLAIN,
    LossTargets,
    LossWeights,
    loss_targets,
    nextflow_loss,
    num_trained_positions,
    warn_of_miscounting,
)
from .sequence.packed_attention import packed_causal_mask
from .sequence.padding import pad_codes
from .sequence.scale_sdpa import ScaleAttentionMixin, ScaleMaskedMixin, check_cache, is_empty, plan_attention
from .utils.atomic_files import atomic_save
from .utils.model_cards import ModelCardMixin, with_card
from .utils.offloading import ExecutionDeviceMixin
from .utils.older_transformers import CACHE_KEYWORD, accepts_cache_keyword
from .utils.saved_adapters import FOLDER as ADAPTERS
from .utils.saved_adapters import load_adapters
from .utils.strict_loading import StrictLoadingMixin
from .vision_tokenizer.resampling import resample


@dataclass
class NextFlowCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`NextFlowForConditionalGeneration`].

    Args:
        loss: scalar; present if `labels` are given.
        mean_loss: scalar without a gradient, the mean over the batch's own trained positions. It differs from `loss` if
            `num_items_in_batch` gives the number of positions of a larger batch.
        logits: (B, L, text vocabulary + codes), text first; `None` with `labels`, since then only trained positions are
            projected to logits.
        text_loss, image_loss: scalars; NaN if the batch trains on no text, or no image.
        scale_losses: (K,) mean loss of each scale, unweighted.
        text_accuracy, scale_accuracies: (), (K,) shares of trained positions whose class is the most probable of all.
        num_trained: (1 + K,) int64, the numbers of text tokens, and of codes of each scale, in these means.
    """

    mean_loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    scale_losses: torch.FloatTensor | None = None
    text_accuracy: torch.FloatTensor | None = None
    scale_accuracies: torch.FloatTensor | None = None
    num_trained: torch.LongTensor | None = None


class NextFlowVisualEmbedding(nn.Module):
    """Input embeddings of the slots of an image: code vectors through a connector, plus embeddings of the scale's index
    and of the number of scales.
    """

    def __init__(self, config: NextFlowConfig):
        super().__init__()
        vq_config, hidden_size = config.vq_config, config.text_config.hidden_size
        self.config = config
        self.codes = nn.Embedding(vq_config.codebook_size, vq_config.code_dim)
        self.connector = nn.Sequential(
            nn.Linear(vq_config.code_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        # Row k is for the slots that predict grid k. The last row is for the slots that read a last grid, at any level:
        # they need a separate row, since at a higher level grid k = K+1 is predicted.
        self.scale = nn.Embedding(len(vq_config.scales) + 2, hidden_size)

    def slot_features(self, image_tokens: torch.Tensor, schedule: ScaleSchedule, scale: int) -> torch.Tensor:
        """Features (B, h*w, C) of the slots of grid `scale` (2 … K+1), from codes (B, n) of all grids before it.

        The slots read only the codes of the grid before, upsampled to their size; or, with `accumulate_features`, the
        sum over all grids before. The slots K+1, where there are any, read the last grid at its own size.
        """
        config = self.config.vq_config
        grids = schedule.split(image_tokens[:, : schedule.offsets[scale - 1]])
        grid = (schedule.grids + (schedule.final_grid,))[scale - 1]
        if self.config.accumulate_features:
            vectors = (self._vectors(codes) for codes in grids)
            total = sum(resample(vector, schedule.final_grid, config.upsample) for vector in vectors)
            features = resample(total, grid, config.downsample)
        else:
            features = resample(self._vectors(grids[-1]), grid, config.upsample)
        return features.flatten(2).transpose(1, 2)

    def _vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) → (B, C, h, w) in float32."""
        return self.codes(codes).permute(0, 3, 1, 2).float()

    def forward(self, features: torch.Tensor, scale_ids: torch.Tensor, num_scales: torch.Tensor) -> torch.Tensor:
        """Features (…, C), k (…) and K (…) of slots → embeddings (…, D)."""
        rows = torch.where(scale_ids > num_scales, self.scale.num_embeddings - 1, scale_ids)
        embeds = self.connector(features.to(self.scale.weight.dtype)) + self.scale(rows)
        return embeds + self._scale_length(num_scales).to(embeds.dtype)

    def _scale_length(self, num_scales: torch.Tensor) -> torch.Tensor:
        # Sinusoids of the number of scales encode the resolution (section 2.2); scaled like an embedding.
        half = self.config.text_config.hidden_size // 2
        frequencies = 10000 ** (-torch.arange(half, device=num_scales.device) / half)
        angles = num_scales[..., None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1) * self.config.initializer_range


class NextFlowPreTrainedModel(ModelCardMixin, StrictLoadingMixin, ExecutionDeviceMixin, PreTrainedModel):
    """What the models of this family share: loading, placement on devices, and initial weights."""

    config: NextFlowConfig
    # Adapters in the folder belong to the weights that are replaced, so they are replaced too.
    save_pretrained = with_card(atomic_save(PreTrainedModel.save_pretrained, replaced=[ADAPTERS]))
    base_model_prefix = "model"
    input_modalities, output_modalities = ("image", "text"), ("image", "text")
    # Whether `generate_images` takes a `region` outside of which an image is kept.
    draws_in_regions = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "NextFlowVQModel", "NextFlowVisualEmbedding"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # FlashAttention would silently drop the block mask of the scales.
    _supports_flash_attn = False
    # Modules that are never quantised, whatever the config says: names from the root, with and without a head.
    _keep_in_fp32_modules = ["vq_model", "model.vq_model"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        path = pretrained_model_name_or_path
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        # Loading makes new parameters, all of which require gradients.
        model.vq_model.requires_grad_(False)
        model.vq_model.keep_codes_in_float32()
        if path is not None:
            load_adapters(model, path, **kwargs)
        return (model, info) if output_loading_info else model

    def train(self, mode: bool = True):
        super().train(mode)
        # Always in evaluation mode: dropout in a vision tower would give other codes for the same image.
        self.vq_model.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NextFlowVisualEmbedding):
            init.normal_(module.codes.weight)
            init.normal_(module.scale.weight, std=self.config.initializer_range)


class NextFlowAttention(ScaleAttentionMixin, Qwen2_5_VLAttention):
    """Qwen2.5-VL's attention with the argument `bidirectional`."""


class NextFlowTextModel(ScaleMaskedMixin, Qwen2_5_VLTextModel):
    """The backbone; its masks and attention go through transformers' interfaces, so flex attention serves it too."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            # Weights and their initial values stay as they are; only the forward pass takes one more argument.
            layer.self_attn.__class__ = NextFlowAttention


class NextFlowModel(NextFlowPreTrainedModel):
    """The backbone with its vision tokenizer and its visual embedding, without a head."""

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.language_model = NextFlowTextModel._from_config(config.text_config)
        self.visual_embedding = NextFlowVisualEmbedding(config)
        self.vq_model = frozen_vision_tokenizer(config.vq_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.language_model.embed_tokens = value

    def schedules_of(self, image_grids: torch.Tensor | None) -> tuple[ScaleSchedule, ...]:
        """Schedules of images with the final grids `image_grids` (num_images, 2)."""
        return schedules_of(image_grids, self.config)

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Codes (num_images, N), padded with -1, of images (num_images, 3, H, W), padded on the right and at the
        bottom.
        """
        config = self.config.vq_config
        patch_size = config.patch_size
        tokens: list[torch.Tensor | None] = [None] * len(image_grids)
        for grid in sorted({tuple(grid) for grid in image_grids.tolist()}):
            chosen = [i for i, other in enumerate(image_grids.tolist()) if tuple(other) == grid]
            pixels = pixel_values[chosen, :, : grid[0] * patch_size, : grid[1] * patch_size]
            schedule = config.scale_schedules.for_size(*pixels.shape[-2:])
            parts = pixels.split(images_at_once(config, config.pixel_channels, schedule, size=4))
            codes = torch.cat([self.vq_model.encode(part).image_tokens for part in parts])
            for index, row in zip(chosen, codes):
                tokens[index] = row
        return pad_codes(tokens)

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Images, a list of (3, H, W) in [-1, 1], from codes (num_images, n) padded with -1.

        The codes may cover only the first scales of every image; then the images are previews. Without `image_grids`
        they must be all codes of square images.

        Raises:
            ValueError: without `image_grids`, for codes that no square has.
        """
        if image_grids is None:
            image_grids = self._squares(image_tokens)
        counts = (image_tokens >= 0).sum(1).tolist()
        kinds = list(zip(self.schedules_of(image_grids), counts))
        images: list[torch.Tensor | None] = [None] * len(kinds)
        for schedule, count in dict.fromkeys(kinds):
            chosen = [index for index, kind in enumerate(kinds) if kind == (schedule, count)]
            pixels = self.vq_model.decode(image_tokens[chosen, :count], schedule)
            for index, image in zip(chosen, pixels):
                images[index] = image
        return images

    def _squares(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """The final grids of square images with as many codes as each row."""
        schedules = self.config.vq_config.scale_schedules
        squares = {s.num_tokens: s.final_grid for s in (schedules.for_size(n, n) for n in schedules.resolutions)}
        counts = (image_tokens >= 0).sum(1).tolist()
        if other := [count for count in counts if count not in squares]:
            raise ValueError(
                f"No square image has {other[0]} codes, but {', '.join(map(str, squares))}; give image_grids."
            )
        return torch.tensor([squares[count] for count in counts], device=image_tokens.device)

    def embed_images(self, image_tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Embeddings (S, D) of all slots of a layout; `image_tokens` (num_images, N) are the codes of its images."""
        schedules, embedding, config = layout.schedules, self.visual_embedding, self.config
        features: list[torch.Tensor | None] = [None] * len(schedules)
        for schedule in set(schedules):
            chosen = [i for i, other in enumerate(schedules) if other == schedule]
            tokens = image_tokens[chosen, : num_codes_read(schedule, config)]
            scales = range(2, 2 + len(schedule.slot_grids(config.read_last_scale)))
            grids = [embedding.slot_features(tokens, schedule, scale) for scale in scales]
            # Looked up even if no slot reads it, so that the table has a gradient.
            nothing = embedding.codes(tokens[:, :0]).float()
            for index, row in zip(chosen, torch.cat([nothing, *grids], dim=1)):
                features[index] = row
        scale_ids = layout.scale_ids.flatten()[layout.slot_places]
        return embedding(torch.cat(features), scale_ids, layout.num_scales)

    def embed_sequence(
        self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, layout: SequenceLayout | None
    ) -> torch.Tensor:
        """Embeddings (B, L, D) of text tokens and of the slots of images; without images no layout is needed."""
        embeds = self.language_model.embed_tokens(input_ids)
        if layout is None or not layout.schedules:
            if not torch.is_grad_enabled():
                return embeds
            # Processes wait for each other's gradients, so every parameter needs a gradient in every batch, even of
            # zeros.
            none = input_ids.new_zeros(0)
            slots = self.visual_embedding(self.visual_embedding.codes(none).float(), none, none)
            return embeds + slots.sum().to(embeds)
        slots = self.embed_images(image_tokens, layout)
        return embeds.flatten(0, 1).index_copy(0, layout.slot_places, slots.to(embeds)).view_as(embeds)

    def layout_batch(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> SequenceLayout:
        """The checked layout of the inputs of `forward`; arguments and errors are those of `forward`.

        Positions continue from the cache, unless `position_ids` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if input_ids is None:
            input_ids = text_ids(inputs_embeds, image_tokens, image_grids)
        mask, start, reach = _last_columns(attention_mask, input_ids), 0, 0
        if position_ids is None and not is_empty(past_key_values):
            if getattr(past_key_values, "holds_images", False):
                # Images take fewer positions than slots, so the next position does not follow from the cache's length.
                raise ValueError(
                    "A pass on a cache that holds images needs position_ids; see layout_sequence, or call generate."
                )
            start, length = past_key_values.get_seq_length(), input_ids.shape[1]
            reach = 0 if torch.is_tensor(start) else start + length
            if mask is not None:
                if not torch.is_tensor(start) and attention_mask.shape[1] != start + length:
                    raise ValueError(
                        f"attention_mask has {attention_mask.shape[1]} columns, but covers {start} tokens in the cache "
                        f"and {length} behind them."
                    )
                start = attention_mask[:, :-length].sum(1, keepdim=True)
        layout = layout_batch(self.config, input_ids, mask, image_tokens, image_grids, seq_idx, start)
        if reach > self.config.text_config.max_position_embeddings:
            # Padding takes no positions. The exact number is read from the device only if the columns exceed the limit.
            check_num_positions(int(layout.position_ids.max()) + 1, self.config)
        return layout

    @accepts_cache_keyword
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_tokens: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        layout: SequenceLayout | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of sequences with whole images, or of embeddings that come with positions and mask.

        Args:
            input_ids: (B, L).
            attention_mask: (B, past + L), 1 for valid positions; or a dict of prepared masks.
            position_ids: (3, B, L); default: the layout's. If they are given without images, the values of tokens are
                not read, so the CPU does not wait for the device.
            inputs_embeds: (B, L, D) of text in place of `input_ids`; with a `layout` also of images.
            image_tokens: (num_images, N) codes that the slots read.
            image_grids: (num_images, 2) final grids.
            seq_idx: (B, L) which sample of its row a position belongs to, where rows are packed.
            layout: the layout of the batch, if the caller has computed it (`layout_batch`); then `image_grids` are not
                needed.

        Raises:
            ValueError: if placeholders, grids and codes do not match, packed rows come with a cache, sequences take
                more positions than the backbone has, images come with embeddings, or a pass without position_ids goes
                on from a cache that holds images.
        """
        if seq_idx is not None and past_key_values is not None:
            raise ValueError("Packed rows (seq_idx) cannot be continued: a cache does not tell their samples apart.")
        check_cache(past_key_values, self.language_model.config)
        if layout is not None:
            _check_prepared(layout, input_ids, image_tokens)
        elif position_ids is None or image_tokens is not None or image_grids is not None:
            layout = self.layout_batch(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, image_tokens, image_grids,
                seq_idx,
            )  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.embed_sequence(input_ids, image_tokens, layout)
        elif input_ids is not None:
            raise ValueError("Give either input_ids or inputs_embeds.")
        if position_ids is None:
            position_ids = layout.position_ids
        holds_images = layout is not None and len(layout.schedules) > 0
        block_ids = layout.block_ids if holds_images else None
        if seq_idx is not None:
            mask = packed_causal_mask(self.language_model.config, inputs_embeds, seq_idx, block_ids)
            attention_mask, use_cache = {"full_attention": mask}, False
        elif not isinstance(attention_mask, dict) and (holds_images or not is_empty(past_key_values)):
            mask = self._causal_mask(inputs_embeds, attention_mask, past_key_values, block_ids)
            attention_mask = {"full_attention": mask}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_KEYWORD: past_key_values},
            use_cache=use_cache,
            **kwargs,
        )
        if holds_images and (cache := outputs.get(CACHE_KEYWORD)) is not None:
            cache.holds_images = True
        return outputs

    def _causal_mask(self, inputs_embeds, attention_mask, past_key_values, block_ids):
        """The mask of embeddings (B, L, D) after a cache: causal, and bidirectional within each block (B, L)."""
        config = self.language_model.config
        # While text is generated no value is read, so no token waits for the device. A static cache has more keys than
        # were written.
        begins = is_empty(past_key_values) and not getattr(past_key_values, "is_compileable", False)
        if begins and (attention_mask is None or attention_mask.shape == block_ids.shape):
            samples = torch.zeros_like(block_ids) if attention_mask is None else attention_mask.long() - 1
            if (plan := plan_attention(config, samples, block_ids, block_ids.shape[1])) is not None:
                return plan
        if block_ids is not None and past_key_values is not None:
            block_ids = nn.functional.pad(block_ids, (int(past_key_values.get_seq_length()), 0), value=-1)
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_KEYWORD: past_key_values},
            block_sequence_ids=block_ids,
            # Whether the mask can be skipped depends on its values, for which a decoding step must not wait.
            allow_is_causal_skip=attention_mask is None or is_empty(past_key_values),
        )


class NextFlowForConditionalGeneration(NextFlowPreTrainedModel, NextFlowGenerationMixin):
    """Text and images in, text and images out.

    The head is one softmax over text and codes. Its weight is stored as two matrices, `lm_head` (text, tied to the
    input embeddings by `tie_word_embeddings`) and `visual_head` (codes), so drawing computes only the second one.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output", "visual_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight", "visual_head": "keep_full_weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.model = NextFlowModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.visual_head = nn.Linear(text_config.hidden_size, config.vq_config.codebook_size, bias=False)
        # A new model has no settings of its own; this tells it from a checkpoint whose settings are missing.
        self.generation_config.image_sampling = {}
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    @property
    def vq_model(self) -> NextFlowVQModel:
        return self.model.vq_model

    @torch.no_grad()
    def num_trained_positions(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_grids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        **batch,
    ) -> torch.Tensor:
        """The number () int64 of positions over which the loss of a batch is averaged: text tokens and codes of images.

        The arguments are those of `forward`. It is cheap, since no layout is computed.
        """
        predictors = predictors_of(input_ids, attention_mask, seq_idx)
        return num_trained_positions(input_ids, labels, predictors, self.model.schedules_of(image_grids), self.config)

    @torch.no_grad()
    def load_vision_tokenizer(self, vq_model: NextFlowVQModel):
        """Use a trained tokenizer; the visual embeddings start from its codebooks (paper, section 3.1)."""
        self.model.vq_model.load_state_dict(vq_model.state_dict())
        self.model.visual_embedding.codes.weight.copy_(vq_model.quantizer.codebook)

    def get_image_tokens(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_tokens(pixel_values, image_grids)

    def decode_image_tokens(
        self, image_tokens: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        return self.model.decode_image_tokens(image_tokens, image_grids)

    @accepts_cache_keyword
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_tokens: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        image_labels: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        layout: SequenceLayout | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        codes_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_weights: LossWeights = PLAIN,
        inside: Callable | None = None,
        **kwargs,
    ) -> NextFlowCausalLMOutputWithPast:
        """One pass over sequences with whole images.

        Args:
            input_ids: (B, L) with `image_token_id` in the slots of images.
            attention_mask: (B, past + L).
            pixel_values: (num_images, 3, H, W) in [-1, 1], padded right and bottom; encoded if there are no
                `image_tokens`.
            image_tokens: (num_images, N) codes to read, padded with -1, in order of appearance, row by row.
            image_grids: (num_images, 2) final grids (height, width).
            image_labels: (num_images, N) codes to predict; default `image_tokens`. They differ under self-correction.
            labels: (B, L), -100 where nothing is to be learned; an image is trained on if and only if its `<eoi>` has a
                label. The nearest position before a text token that is not padding predicts it.
            seq_idx: (B, L) the sample of its row to which a position belongs (0, 1, … from left to right), for packed
                rows. Samples do not attend to each other; nothing predicts the first token of one, whatever its label.
                Padding is a sample of its own; `attention_mask` is ignored.
            layout: the layout of the batch, if it was computed before (`layout_batch` in `sequence/layout.py`). Then
                `image_grids` are not needed, no value is read, and the pass compiles in one graph (without `labels`).
            logits_to_keep: compute the logits of only this many last positions, or of these positions; 0: of all.
            codes_only: compute only the logits of codes, as drawing does.
            num_items_in_batch: the number of trained positions over which the loss is averaged, if the batch is a part
                of a larger one: the sum of `num_trained_positions` over its parts. Default: those of this batch.
            loss_weights: weights in the loss in addition to those of the scales, see [`LossWeights`].
            inside: a function to run instead of the forward pass: it is called with the model, and the tensors that it
                returns are returned. A wrapper of the model (DDP, FSDP2, an adapter) then sees a single call, even if
                the function runs the model several times or in parts; it must call `model.forward`, not the model.

        Raises:
            ValueError: if placeholders, grids and codes do not match, for labels out of range, or if
                `num_items_in_batch` comes without labels.
        """
        if inside is not None:
            return inside(self)
        if image_tokens is None and pixel_values is not None:
            if image_grids is None:
                raise ValueError("pixel_values need image_grids, the final grid of each image; see NextFlowProcessor.")
            if input_ids is not None:
                # Checked before the images are encoded, which takes the most time.
                mask, schedules = _last_columns(attention_mask, input_ids), self.model.schedules_of(image_grids)
                layout_sequence(input_ids, mask, schedules, self.config, seq_idx)
            image_tokens = self.get_image_tokens(pixel_values, image_grids)
        if labels is not None:
            if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
                raise ValueError("The loss needs attention_mask as (B, past + L): it says which positions are padding.")
            if layout is None:
                layout = self.model.layout_batch(
                    input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, image_tokens, image_grids,
                    seq_idx,
                )  # fmt: skip
            use_cache = bool(use_cache)  # no cache by default, since a loss needs none
        elif num_items_in_batch is not None:
            # `Trainer` removes the labels if a function outside of the model computes the loss.
            raise ValueError(
                "num_items_in_batch came without labels; the model computes its loss by itself, without "
                "label_smoothing_factor or compute_loss_func."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_tokens=image_tokens,
            image_grids=image_grids,
            seq_idx=seq_idx,
            layout=layout,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, losses, logits = outputs.last_hidden_state, {}, None
        if labels is not None:
            image_labels = image_tokens if image_labels is None else image_labels
            input_ids = text_ids(inputs_embeds) if input_ids is None else input_ids
            targets = loss_targets(input_ids, labels, image_labels, layout, layout.schedules, self.config, loss_weights)
            num_scales = len(self.config.vq_config.scales)
            terms = self._cross_entropy(hidden_states[targets.mask], targets, loss_weights.z)
            losses = nextflow_loss(*terms, targets, num_scales, num_items_in_batch)
            if num_items_in_batch is not None:
                warn_of_miscounting(labels, targets)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = (self.visual_head if codes_only else self.head)(hidden_states[:, kept, :])
        return NextFlowCausalLMOutputWithPast(
            logits=logits,
            **{CACHE_KEYWORD: outputs.get(CACHE_KEYWORD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, D) → logits (…, text vocabulary + codes)."""
        return torch.cat([self.lm_head(hidden_states), self.visual_head(hidden_states)], dim=-1)

    def _cross_entropy(
        self, hidden_states: torch.Tensor, targets: LossTargets, z_weight: float = 0.0
    ) -> tuple[torch.Tensor, ...]:
        """For trained positions (n, D) the weighted sum () of the losses, the cross-entropies (n,), and the most
        probable classes (n,), without computing all logits at once.
        """
        matrices = [_own_matrix(head) for head in (self.lm_head, self.visual_head)]
        if all(matrix is not None for matrix in matrices):
            return fused_cross_entropy(hidden_states, matrices, targets.classes, targets.weights, z_weight)
        num_classes = self.config.vocab_size
        return called_cross_entropy(self.head, hidden_states, targets.classes, targets.weights, num_classes, z_weight)


def _own_matrix(head: nn.Module) -> torch.Tensor | None:
    """The matrix (V, D) of a head that is a plain matrix product; `None` for a head that must be called."""
    if type(head).forward is not nn.Linear.forward:  # an adapter wraps it, or it is quantized
        return None
    if hasattr(head, "unshard"):
        # FSDP2 gathers the weight only when the head is called.
        head.unshard()
        return head.weight
    # Offloading and tensor parallelism change the call; weights of the latter are not plain tensors.
    changed = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return None if changed or type(head.weight.data) is not torch.Tensor else head.weight


def _last_columns(attention_mask: torch.Tensor | dict | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    """The part (B, L) of a mask (B, past + L) for the tokens of this pass; `None` for prepared masks."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -input_ids.shape[1] :]


def _check_prepared(layout: SequenceLayout, input_ids: torch.Tensor | None, image_tokens: torch.Tensor | None):
    """Raises `ValueError` for a layout of another batch; only shapes are compared."""
    if input_ids is None:  # embeddings, in which images are embedded too
        return
    if layout.slot_mask.shape != input_ids.shape:
        raise ValueError(
            f"The layout is of a batch {tuple(layout.slot_mask.shape)}, but input_ids are {tuple(input_ids.shape)}."
        )
    count = 0 if image_tokens is None else len(image_tokens)
    if len(layout.schedules) != count:
        raise ValueError(f"The layout is of {len(layout.schedules)} images, but {count} rows of image_tokens came.")
