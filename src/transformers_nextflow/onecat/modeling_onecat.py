"""OneCAT: reads text and images, writes text, and draws images bit by bit, scale by scale (onecat-ai/OneCAT-3B)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,  # noqa: F401 - diffusers looks for it beside a component's class
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..modeling_nextflow import NextFlowModel, NextFlowPreTrainedModel
from ..scale_schedule import ScaleSchedule
from ..sequence.layout import check_num_positions
from ..sequence.padding import check_left_padded
from ..utils.evaluation_mode import in_evaluation_mode
from ..utils.offloading import onload_weights
from ..utils.older_transformers import CACHE_KEYWORD, accepts_cache_keyword
from ..vision_tokenizer.resampling import resample
from .backbone import READ, TEXT, OneCatTextModel, TokenKinds
from .configuration_onecat import OneCatConfig
from .generation_onecat import OneCatDrawingMixin
from .modeling_bitwise_vq import BitwiseVQModel, frozen_bitwise_tokenizer
from .schedules import cell_positions


@dataclass
class OneCatCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`OneCatForConditionalGeneration`].

    Args:
        logits: (B, L, V) logits of text; `None` if drawn images were given.
        bit_logits: (B, N, bits, 2) logits of class 0 and class 1 of each bit of the codes of drawn images.
    """

    bit_logits: torch.FloatTensor | None = None


class PatchReader(nn.Module):
    """The encoder of input images: patches plus positions, 2 x 2 patches joined, and an MLP; it has no transformer."""

    def __init__(self, config: OneCatConfig):
        super().__init__()
        width, hidden_size, patch_size = (
            config.reader_hidden_size,
            config.text_config.hidden_size,
            config.reader_patch_size,
        )
        self.side = config.reader_image_size // patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        # Row 0 is for a class token, which is not used.
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (h/2 * w/2, D) of an image (3, H, W) of h x w patches, both even."""
        patches = self.patch_embedding(pixel_values[None].to(self.patch_embedding.weight.dtype))
        table = self.position_embedding[:, 1:].float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        patches = patches + resample(table, tuple(patches.shape[-2:]), "bicubic").to(patches.dtype)
        joined = patches[0].unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # channels, row, its half, column, its half
        return self.projector(joined.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1))


class OneCatForConditionalGeneration(NextFlowPreTrainedModel, OneCatDrawingMixin, GenerationMixin):
    """Reads a prompt with images, and draws an image (`generate_images`) or writes text (`generate`).

    All tokens share attention, norms and embeddings; text, input images, and slots of drawn images each have their own
    MLP. Slots of scale k read the sum of the codes of all scales before, and predict the bits of their own cells.
    """

    config: OneCatConfig
    _no_split_modules = ["OneCatDecoderLayer", "BitwiseVQModel", "PatchReader"]
    card_title, card_origin = "OneCAT", "not yet verified on the released weights"
    # Regions are not supported: codes are signs of residuals, so there are no nearest codes to keep a region with.
    draws_in_regions = False

    def __init__(self, config: OneCatConfig):
        super().__init__(config)
        text, bits = config.text_config, config.vq_config.code_bits
        size = text.hidden_size
        self.language_model = OneCatTextModel._from_config(
            text, adapter_rank=config.adapter_rank, drawing_only=config.drawing_only,
            drawing_frequencies=config.drawing_frequencies,
        )  # fmt: skip
        self.connector = nn.Sequential(
            nn.Linear(bits, size), nn.GELU(), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size)
        )
        self.first_feature = nn.Embedding(1, bits)
        self.scale_embedding = nn.Embedding(config.num_scale_embeddings, size)
        self.visual_head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 2 * bits))
        if config.drawing_only:
            # Weights of a file that such a model does not load.
            self._keys_to_ignore_on_load_unexpected = [r"\.mlp_ue\.", r"^reader\.", r"^lm_head\."]
        else:
            self.reader = PatchReader(config)
            self.lm_head = nn.Linear(size, text.vocab_size, bias=False)
        self.vq_model: BitwiseVQModel = frozen_bitwise_tokenizer(config.vq_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; `drawing_only=True` leaves out the modules that only read images and write text.

        Raises:
            ValueError: naming tensors that are missing or no finite floats, and for quantisation.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "OneCAT is not quantised: its drawing expert has a part for each scale, which quantised layers do not "
                "have. Load it in bfloat16, with drawing_only=True or a device_map that leaves experts on the CPU."
            )
        return super().from_pretrained(*args, **kwargs)

    @staticmethod
    def drawing_device_map(config: OneCatConfig, device: int | str = 0, away: str = "cpu") -> dict[str, int | str]:
        """A `device_map` for `drawing_only=True`: modules that draw on a device, modules that only read prompts
        elsewhere.

        The experts of text and the embeddings, two fifths of the weights, are moved to the device once for each
        drawing.

        Args:
            config: the config of the model.
            device: the device that computes.
            away: "cpu" or "disk".
        """
        parts = {"self_attn": device, "mlp_te": away, "mlp_ge": device}
        parts |= {"input_layernorm": device, "post_attention_layernorm": device}
        places = {"language_model.embed_tokens": away, "language_model.norm": device}
        for layer in range(config.text_config.num_hidden_layers):
            places |= {f"language_model.layers.{layer}.{part}": place for part, place in parts.items()}
        rest = ("connector", "first_feature", "scale_embedding", "visual_head", "vq_model")
        return places | dict.fromkeys(rest, device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PatchReader):
            init.normal_(module.position_embedding, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    def schedules_of(self, image_grids: torch.Tensor) -> tuple[ScaleSchedule, ...]:
        """Schedules of images with the final grids `image_grids` (num_images, 2). Raises `ValueError` for other
        grids.
        """
        size = self.config.vq_config.patch_size
        schedules = self.config.vq_config.scale_schedules
        return tuple(schedules.for_size(height * size, width * size) for height, width in image_grids.tolist())

    # Images of each size at once, from the codes of all scales or of the first ones.
    decode_image_tokens = NextFlowModel.decode_image_tokens

    def embed_prompts(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        pixel_sizes: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, D) of prompts with images, and a mask (B, L) bool of the tokens of images.

        Args:
            pixel_values: (num_images, 3, H, W), padded right and bottom.
            pixel_sizes: (num_images, 2) height and width of each.

        Raises:
            ValueError: if placeholders and images do not match, and for images of a model that only draws.
        """
        config = self.config
        is_read = (input_ids == config.image_token_id) | (input_ids == config.reference_token_id)
        embeds = self.language_model.embed_tokens(input_ids)
        count = int(is_read.sum()) if pixel_values is not None or input_ids.shape[1] > 1 else 0
        if pixel_values is None and not count:
            return embeds, is_read
        if pixel_values is None or pixel_sizes is None:
            raise ValueError(f"The prompts hold {count} placeholders of images; give pixel_values and pixel_sizes.")
        if config.drawing_only:
            raise ValueError("This model was loaded with drawing_only=True and reads no images; load it without.")
        with onload_weights([self.reader]):
            images = [pixels[:, :h, :w] for pixels, (h, w) in zip(pixel_values, pixel_sizes.tolist(), strict=True)]
            features = torch.cat([self.reader(image) for image in images])
        if len(features) != count:
            raise ValueError(f"The prompts hold {count} placeholders of images, but the images have {len(features)}.")
        places = is_read.flatten().nonzero().squeeze(-1)
        return embeds.flatten(0, 1).index_copy(0, places, features.to(embeds)).view_as(embeds), is_read

    def slot_features(self, image_tokens: torch.Tensor, schedule: ScaleSchedule, scale: int) -> torch.Tensor:
        """Features (B, h*w, bits) of the slots of a scale, counted from 0, from codes (B, n) of the scales before."""
        if scale == 0:
            with onload_weights([self.first_feature]):
                return self.first_feature.weight.expand(len(image_tokens), -1, -1)
        total = self.vq_model.quantizer.decode(image_tokens[:, : schedule.offsets[scale]], schedule)
        return resample(total, schedule.grids[scale], "bilinear").flatten(2).transpose(1, 2)

    def embed_slots(self, features: torch.Tensor, scale: int) -> torch.Tensor:
        """Features (B, n, bits) of the slots of a scale, counted from 0 → embeddings (B, n, D)."""
        with onload_weights([self.scale_embedding]):
            embeds = self.connector(features.to(self.scale_embedding.weight.dtype))
            return embeds + self.scale_embedding.weight[scale]

    @accepts_cache_keyword
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_sizes: torch.LongTensor | None = None,
        image_tokens: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> OneCatCausalLMOutputWithPast:
        """One pass over prompts: of a chat, or of drawings with their whole images.

        Args:
            input_ids: (B, L) prompts, left padded, with placeholders for input images.
            attention_mask: (B, past + L).
            position_ids: (B, L) for chats; default: counted from the first token.
            pixel_values, pixel_sizes: input images as in `embed_prompts`, in order of appearance.
            image_tokens: (B, N) codes of one image drawn after each prompt, padded with -1.
            image_grids: (B, 2) their final grids.
            logits_to_keep: compute text logits of only this many last positions, or of these positions; 0: of all.

        Raises:
            ValueError: for inputs that do not fit together, prompts that are not padded on the left, and more positions
                than the model has.
        """
        if image_tokens is not None:
            hidden_states = self._read_drawings(
                input_ids, attention_mask, pixel_values, pixel_sizes, image_tokens, image_grids
            )
            bits = self.visual_head(hidden_states).unflatten(-1, (-1, 2))
            return OneCatCausalLMOutputWithPast(bit_logits=bits)
        if self.config.drawing_only:
            raise ValueError("This model was loaded with drawing_only=True and writes no text; load it without.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.language_model.config)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            every = mask if mask.shape[1] == past + input_ids.shape[1] else F.pad(mask, (past, 0), value=1)
            position_ids = (every.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        outputs = self.read(
            input_ids, attention_mask, position_ids, past_key_values, pixel_values, pixel_sizes, use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return OneCatCausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state[:, kept, :]),
            **{CACHE_KEYWORD: past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def read(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_sizes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) of prompts at positions (B, L) in chats, or (2, B, L) before a drawing."""
        embeds, is_read = self.embed_prompts(input_ids, pixel_values, pixel_sizes)
        block_ids, kinds = None, TokenKinds.all_of(TEXT)
        if pixel_values is not None:
            # All tokens of input images of a sample attend to each other, also those of different images.
            block_ids = is_read.long() - 1
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            block_ids = F.pad(block_ids, (int(past), 0), value=-1)
            kinds = TokenKinds.of(torch.where(is_read, READ, TEXT))
        prepared = attention_mask if isinstance(attention_mask, dict) else None
        if prepared is None:
            prepared = {"full_attention": self._mask(embeds, attention_mask, block_ids, past_key_values)}
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=prepared,
            position_ids=position_ids,
            kinds=kinds,
            **{CACHE_KEYWORD: past_key_values},
            use_cache=use_cache,
            **kwargs,
        )

    def _mask(self, embeds, attention_mask, block_ids, past_key_values=None):
        return create_causal_mask(
            config=self.language_model.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            **{CACHE_KEYWORD: past_key_values},
            block_sequence_ids=block_ids,
        )

    def _read_drawings(
        self, input_ids, attention_mask, pixel_values, pixel_sizes, image_tokens, image_grids
    ) -> torch.Tensor:
        """Hidden states (B, N, D) of all slots of images after prompts, in one pass with the mask of the scales."""
        if image_grids is None or len(image_tokens) != len(input_ids) or len(image_grids) != len(input_ids):
            raise ValueError(f"{len(input_ids)} prompts take as many rows of image_tokens and of image_grids.")
        schedules, length = self.schedules_of(image_grids), input_ids.shape[1]
        counts = (image_tokens >= 0).sum(1).tolist()
        if wrong := [row for row, schedule in enumerate(schedules) if counts[row] != schedule.num_tokens]:
            expected = schedules[wrong[0]].num_tokens
            raise ValueError(f"Image {wrong[0]} has {counts[wrong[0]]} codes; all scales of its grid have {expected}.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_left_padded(mask, "Prompts")
        embeds, is_read = self.embed_prompts(input_ids, pixel_values, pixel_sizes)
        width, origins = image_tokens.shape[1], mask.sum(-1)
        slots = embeds.new_zeros(len(embeds), width, embeds.shape[-1])
        places = torch.zeros(2, len(embeds), width, dtype=torch.long, device=embeds.device)
        kinds = torch.full((len(embeds), width), TEXT, device=embeds.device)  # of padding, which nothing reads
        for row, schedule in enumerate(schedules):
            for scale, (start, stop) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
                features = self.slot_features(image_tokens[row : row + 1], schedule, scale)
                slots[row, start:stop] = self.embed_slots(features, scale)[0].to(slots)
                places[:, row, start:stop] = cell_positions(schedule, scale).to(places) + origins[row]
                kinds[row, start:stop] = scale
        places_of_text = prompt_positions(mask)
        check_num_positions(int(places.max()) + 1, self.config)
        kinds_of_text = torch.where(is_read, READ, TEXT)
        block_ids = torch.cat([is_read.long() - 1, torch.where(kinds >= 0, kinds + 1, -1)], dim=1)
        embeds = torch.cat([embeds, slots], dim=1)
        full_mask = torch.cat([mask, (kinds >= 0).to(mask)], dim=1)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": self._mask(embeds, full_mask, block_ids)},
            position_ids=torch.cat([places_of_text, places], dim=2),
            kinds=TokenKinds.of(torch.cat([kinds_of_text, kinds], dim=1)),
            use_cache=False,
        )
        return output.last_hidden_state[:, length:]

    @in_evaluation_mode
    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Answer prompts (B, L) of a chat with text; all else is as in [`~transformers.GenerationMixin.generate`].

        Raises:
            ValueError: for prompts that with `max_new_tokens` take more positions than the model has, several answers
                to a prompt with images, and a model that only draws.
        """
        if self.config.drawing_only:
            raise ValueError("This model was loaded with drawing_only=True and writes no text; load it without.")
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, is_first_iteration: bool = False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and kwargs.get("pixel_values") is not None:
            # The mask that transformers prepares for static caches does not know which tokens attend bidirectionally.
            inputs["attention_mask"] = attention_mask
        if not is_first_iteration and inputs.get("use_cache", True):
            # The images are in the cache already.
            inputs |= {"pixel_values": None, "pixel_sizes": None}
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        check_num_positions(max_cache_length + 1, self.config)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        if expand_size > 1 and kwargs.get("pixel_values") is not None:
            raise ValueError(
                "OneCAT gives a prompt with images one answer; repeat it in the batch, in place of "
                "num_return_sequences or num_beams."
            )
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def prompt_positions(mask: torch.Tensor) -> torch.Tensor:
    """Row and column (2, B, L) of the tokens of drawing prompts (B, L), padded on the left: both are the token's
    number.
    """
    return (mask.cumsum(-1) - 1).clamp_min(0).expand(2, -1, -1)
