"""NextFlow: one decoder-only transformer over text tokens and pictures drawn scale by scale (paper, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2_5_VLTextModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_nextflow import NextFlowConfig
from .fused_cross_entropy import fused_cross_entropy
from .generation_nextflow import NextFlowGenerationMixin
from .loss_nextflow import IGNORE_INDEX, LossTargets, loss_targets, nextflow_loss
from .modeling_nextflow_vq import NextFlowVQModel, StrictLoadingMixin
from .multiscale_quantizer import resample
from .offloading import ExecutionDeviceMixin
from .packed_attention import packed_causal_mask, starts_of_samples
from .saved_adapters import load_adapters
from .scale_attention import ScaleAttentionMixin
from .scale_schedule import ScaleSchedule
from .sequence_layout import SequenceLayout, layout_sequence


@dataclass
class NextFlowCausalLMOutputWithPast(ModelOutput):
    """Output of [`NextFlowForConditionalGeneration`].

    Args:
        loss: scalar, with `labels`.
        logits: (B, L, text vocabulary + codes), text first; `None` with `labels`, where only trained positions are
            brought through the head.
        text_loss, image_loss: scalars; NaN if the batch trains on nothing of the kind.
        scale_losses: (K,) mean loss of each scale, unweighted.
        text_accuracy, scale_accuracies: (), (K,) shares of trained positions whose class is the most probable of all.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    scale_losses: torch.FloatTensor | None = None
    text_accuracy: torch.FloatTensor | None = None
    scale_accuracies: torch.FloatTensor | None = None


class NextFlowVisualEmbedding(nn.Module):
    """What the slots of a picture read: code vectors through a connector, the scale's index, the number of scales."""

    def __init__(self, config: NextFlowConfig):
        super().__init__()
        vq_config, hidden_size = config.vq_config, config.text_config.hidden_size
        self.config = config
        self.codes = nn.Embedding(vq_config.codebook_size, vq_config.code_dim)
        self.connector = nn.Sequential(
            nn.Linear(vq_config.code_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        # Index k belongs to the slots that predict grid k; the one past the last reads the last grid.
        self.scale = nn.Embedding(len(vq_config.scales) + 2, hidden_size)

    def slot_features(self, image_tokens: torch.Tensor, schedule: ScaleSchedule, scale: int) -> torch.Tensor:
        """Features (B, h*w, C) of the slots of grid `scale` (2 … K+1), from codes (B, n) of all grids before it.

        They read the codes of the grid before alone, brought up to their size; or, if so configured, the sum over all
        grids before. The slots K+1, where there are any, read the last grid at its own size.
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
        embeds = self.connector(features.to(self.connector[0].weight.dtype)) + self.scale(scale_ids)
        return embeds + self._scale_length(num_scales).to(embeds.dtype)

    def _scale_length(self, num_scales: torch.Tensor) -> torch.Tensor:
        # Sinusoids of the number of scales tell which resolution is drawn (section 2.2); scaled like an embedding.
        half = self.config.text_config.hidden_size // 2
        frequencies = 10000 ** (-torch.arange(half, device=num_scales.device) / half)
        angles = num_scales[..., None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1) * self.config.initializer_range


class NextFlowPreTrainedModel(StrictLoadingMixin, ExecutionDeviceMixin, PreTrainedModel):
    config: NextFlowConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "NextFlowVQModel", "NextFlowVisualEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # FlashAttention would silently drop the block mask of the scales.
    _supports_flash_attn = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        path = pretrained_model_name_or_path
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        # Loading makes new parameters, which all ask for gradients.
        model.vq_model.requires_grad_(False)
        if path is not None:
            load_adapters(model, path, **kwargs)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NextFlowVisualEmbedding):
            init.normal_(module.codes.weight)
            init.normal_(module.scale.weight, std=self.config.initializer_range)


class NextFlowAttention(ScaleAttentionMixin, Qwen2_5_VLAttention):
    """Qwen2.5-VL's attention, which takes `both_ways` too."""


class NextFlowTextModel(Qwen2_5_VLTextModel):
    """The backbone; its masks and attention go through transformers' interfaces, so flex attention serves it too."""

    _supports_flex_attn = True
    _supports_flash_attn = False

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            # Weights and their initial values stay as they are; only the call takes one argument more.
            layer.self_attn.__class__ = NextFlowAttention


class NextFlowModel(NextFlowPreTrainedModel):
    """The backbone with its vision tokenizer and its visual embedding, without a head."""

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.language_model = NextFlowTextModel._from_config(config.text_config)
        self.visual_embedding = NextFlowVisualEmbedding(config)
        self.vq_model = NextFlowVQModel._from_config(config.vq_config)
        # The paper never trains the tokenizer with the transformer: codes must keep their meaning.
        self.vq_model.requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.language_model.embed_tokens = value

    def schedules_of(self, image_grids: torch.Tensor | None) -> list[ScaleSchedule]:
        """Schedules of pictures whose final grids are (num_images, 2)."""
        if image_grids is None:
            return []
        patch_size, schedules = self.config.vq_config.patch_size, self.config.vq_config.scale_schedules
        return [schedules.for_size(h * patch_size, w * patch_size) for h, w in image_grids.tolist()]

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Codes (num_images, N) of pictures (num_images, 3, H, W) that were padded right and bottom; -1 pads codes."""
        patch_size = self.config.vq_config.patch_size
        tokens: list[torch.Tensor | None] = [None] * len(image_grids)
        for grid in sorted({tuple(grid) for grid in image_grids.tolist()}):
            chosen = [i for i, other in enumerate(image_grids.tolist()) if tuple(other) == grid]
            pixels = pixel_values[chosen, :, : grid[0] * patch_size, : grid[1] * patch_size]
            for index, row in zip(chosen, self.vq_model.encode(pixels).image_tokens):
                tokens[index] = row
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.Tensor, image_grids: torch.Tensor) -> list[torch.Tensor]:
        """Pictures, a list of (3, H, W) in [-1, 1], from codes (num_images, n) padded with -1.

        The codes may cover only the first whole scales of every picture: a preview.
        """
        pictures = []
        for row, schedule in zip(image_tokens, self.schedules_of(image_grids)):
            pictures.append(self.vq_model.decode(row[row >= 0][None], schedule)[0])
        return pictures

    def embed_pictures(
        self, image_tokens: torch.Tensor, schedules: Sequence[ScaleSchedule], scale_ids: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings (S, D) of all slots of pictures with codes (num_images, N), one after the other.

        `scale_ids` (S,) are the slots' scales in the same order.
        """
        if image_tokens is None:
            raise ValueError(f"{len(schedules)} image_grids came without image_tokens or pixel_values; give one.")
        if len(image_tokens) != len(schedules):
            raise ValueError(f"{len(image_tokens)} rows of image_tokens came with {len(schedules)} image_grids.")
        read_last = self.config.read_last_scale
        features: list[torch.Tensor | None] = [None] * len(schedules)
        for schedule in set(schedules):
            chosen = [i for i, other in enumerate(schedules) if other == schedule]
            count = schedule.num_tokens if read_last else schedule.offsets[-2]
            tokens = image_tokens[chosen, :count]
            if tokens.shape[1] < count:
                raise ValueError(
                    f"image_tokens hold {tokens.shape[1]} codes a picture, but the slots of a final grid "
                    f"{schedule.final_grid} read {count}; are they a preview, or from another size?"
                )
            self._check_codes(tokens)
            scales = range(2, 2 + len(schedule.slot_grids(read_last)))
            grids = [self.visual_embedding.slot_features(tokens, schedule, scale) for scale in scales]
            if not grids:  # a picture of one scale has no slots
                grids = [torch.zeros(len(chosen), 0, self.config.vq_config.code_dim, device=scale_ids.device)]
            for index, row in zip(chosen, torch.cat(grids, dim=1)):
                features[index] = row
        counts = torch.tensor([schedule.num_slots(read_last) for schedule in schedules])
        num_scales = torch.tensor([schedule.num_scales for schedule in schedules]).repeat_interleave(counts)
        return self.visual_embedding(torch.cat(features), scale_ids, num_scales.to(scale_ids.device))

    def embed_sequence(
        self,
        input_ids: torch.Tensor,
        image_tokens: torch.Tensor | None,
        schedules: Sequence[ScaleSchedule],
        layout: SequenceLayout | None,
    ) -> torch.Tensor:
        """Embeddings (B, L, D) of tokens and of the slots of pictures; without pictures no layout is needed."""
        embeds = self.language_model.embed_tokens(input_ids)
        if not schedules:
            return embeds
        slots = self.embed_pictures(image_tokens, schedules, layout.scale_ids[layout.slot_mask])
        return embeds.masked_scatter(layout.slot_mask[..., None], slots.to(embeds))

    def _check_codes(self, tokens: torch.Tensor):
        size = self.config.vq_config.codebook_size
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(
                f"image_tokens run from 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}; do they come "
                "from another tokenizer, or from pictures of another size?"
            )

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
        """Hidden states of sequences with whole pictures, or of embeddings that come with positions and mask.

        Args:
            input_ids: (B, L).
            attention_mask: (B, past + L), 1 for valid positions; or a dict of prepared masks.
            position_ids: (3, B, L); default: the layout's.
            image_tokens: (num_images, N) codes that the slots read.
            image_grids: (num_images, 2) final grids.
            seq_idx: (B, L) which sample of its row a position belongs to, where rows are packed.
            layout: of `input_ids`, where the caller has it already.

        Raises:
            ValueError: if placeholders, grids and codes do not match, or packed rows come with a cache.
        """
        block_ids = None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if seq_idx is not None and past_key_values is not None:
            raise ValueError("Packed rows (seq_idx) cannot be continued: a cache does not know its samples apart.")
        if inputs_embeds is None:
            schedules = self.schedules_of(image_grids)
            if layout is None and (
                position_ids is None or schedules or bool((input_ids == self.config.image_token_id).any())
            ):
                mask = _last_columns(attention_mask, input_ids)
                layout = layout_sequence(input_ids, mask, schedules, self.config, seq_idx)
            inputs_embeds = self.embed_sequence(input_ids, image_tokens, schedules, layout)
            block_ids = layout.block_ids if schedules else None
            if position_ids is None:
                if past_key_values is not None and past_key_values.get_seq_length() > 0:
                    # Pictures take fewer positions than slots, so the cache's length does not tell where to go on.
                    raise ValueError("A pass on a cache needs position_ids; see layout_sequence, or call generate.")
                position_ids = layout.position_ids
        if seq_idx is not None:
            mask = packed_causal_mask(self.config.text_config, inputs_embeds, seq_idx, block_ids)
            attention_mask, use_cache = {"full_attention": mask}, False
        elif block_ids is not None and not isinstance(attention_mask, dict):
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask = {
                "full_attention": create_causal_mask(
                    config=self.config.text_config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    block_sequence_ids=nn.functional.pad(block_ids, (past, 0), value=-1),
                )
            }
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class NextFlowForConditionalGeneration(NextFlowPreTrainedModel, NextFlowGenerationMixin):
    """Text and pictures in, text and pictures out.

    The head is one soft-max over text and codes. Its weight is kept in two matrices, `lm_head` (text, tied to the input
    embeddings by `tie_word_embeddings`) and `visual_head` (codes), so that drawing computes only the second one.
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
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    @property
    def vq_model(self) -> NextFlowVQModel:
        return self.model.vq_model

    @torch.no_grad()
    def load_vision_tokenizer(self, vq_model: NextFlowVQModel):
        """Take over a trained tokenizer; the visual embeddings start from its codebooks (paper, section 3.1)."""
        self.model.vq_model.load_state_dict(vq_model.state_dict())
        self.model.visual_embedding.codes.weight.copy_(vq_model.quantizer.codebook)

    def get_image_tokens(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_tokens(pixel_values, image_grids)

    def decode_image_tokens(self, image_tokens: torch.Tensor, image_grids: torch.Tensor) -> list[torch.Tensor]:
        return self.model.decode_image_tokens(image_tokens, image_grids)

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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        codes_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> NextFlowCausalLMOutputWithPast:
        """One pass over sequences with whole pictures.

        Args:
            input_ids: (B, L) with `image_token_id` in the slots of pictures.
            attention_mask: (B, past + L).
            pixel_values: (num_images, 3, H, W) in [-1, 1], padded right and bottom; encoded if no `image_tokens` come.
            image_tokens: (num_images, N) codes to read, padded with -1, in order of appearance, row by row.
            image_grids: (num_images, 2) final grids (height, width).
            image_labels: (num_images, N) codes to write; default `image_tokens`. They differ under self-correction.
            labels: (B, L), -100 where nothing is to be learned; a picture counts iff its `<eoi>` has a label.
            seq_idx: (B, L) which sample of its row a position belongs to (0, 1, … from left to right), where rows are
                packed. Samples do not see each other; nothing predicts the first token of one, whatever its label.
                Padding is a sample of its own; `attention_mask` is not asked.
            logits_to_keep: compute the logits of only so many last positions, or of these positions; 0 of all.
            codes_only: compute the logits of codes alone, as drawing does.
            num_items_in_batch: trained positions over which the loss is averaged, for gradient accumulation.

        Raises:
            ValueError: if placeholders, grids and codes do not match.
        """
        if image_tokens is None and pixel_values is not None:
            if image_grids is None:
                raise ValueError(
                    "pixel_values need image_grids, the final grid of each picture; see NextFlowProcessor."
                )
            image_tokens = self.get_image_tokens(pixel_values, image_grids)
        layout, schedules = None, self.model.schedules_of(image_grids)
        if labels is not None:
            if input_ids is None:
                raise ValueError("The loss needs input_ids: they say where pictures lie.")
            layout = layout_sequence(input_ids, attention_mask, schedules, self.config, seq_idx)
            if seq_idx is not None:
                labels = labels.masked_fill(starts_of_samples(seq_idx), IGNORE_INDEX)
            use_cache = bool(use_cache)  # a loss needs no cache unless it is asked for
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
            targets = loss_targets(input_ids, labels, image_labels, layout, schedules, self.config)
            num_scales = len(self.config.vq_config.scales)
            terms = self._cross_entropy(hidden_states[targets.mask], targets)
            losses = nextflow_loss(*terms, targets, num_scales, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = (self.visual_head if codes_only else self.head)(hidden_states[:, kept, :])
        return NextFlowCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, D) → logits (…, text vocabulary + codes)."""
        return torch.cat([self.lm_head(hidden_states), self.visual_head(hidden_states)], dim=-1)

    def _cross_entropy(self, hidden_states: torch.Tensor, targets: LossTargets) -> tuple[torch.Tensor, ...]:
        """Of trained positions (n, D): the weighted sum () of the cross-entropies, each one (n,), and which classes are
        the most probable ones (n,); without logits where the heads allow it."""
        matrices = [_own_matrix(head) for head in (self.lm_head, self.visual_head)]
        if all(matrix is not None for matrix in matrices):
            return fused_cross_entropy(hidden_states, matrices, targets.classes, targets.weights)
        logits = self.head(hidden_states).float()
        losses = nn.functional.cross_entropy(logits, targets.classes, reduction="none")
        return (losses * targets.weights).sum(), losses, logits.argmax(-1) == targets.classes


def _own_matrix(head: nn.Module) -> torch.Tensor | None:
    """The matrix (V, D) that a head multiplies by, or `None` where only calling it does it right."""
    if not isinstance(head, nn.Linear):  # an adapter wraps it
        return None
    if hasattr(head, "unshard"):
        # FSDP2, which gathers the weight when the head is called; what follows is not a call.
        head.unshard()
        return head.weight
    # Offloading and tensor parallelism (whose weights have placements) change the call.
    changed = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return None if changed or hasattr(head.weight, "placements") else head.weight


def _last_columns(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    """The part (B, L) of a mask (B, past + L) that belongs to the tokens at hand."""
    return attention_mask[:, -input_ids.shape[1] :] if isinstance(attention_mask, torch.Tensor) else None
