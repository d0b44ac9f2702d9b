"""Converts a Qwen2.5-VL to the start of a NextFlow, and the text backbone back (paper, section 3.1)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2_5_VLConfig

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..image_processing_nextflow import NextFlowImageProcessor
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..processing_nextflow import NextFlowProcessor
from ..tokenization_nextflow import add_image_tokens
from ..utils.folder_parts import local_part
from ..utils.user_warnings import warn_user
from .checkpoints import (
    KeyMap,
    ShardedCheckpoint,
    State,
    check_repository,
    check_state,
    check_written,
    config_errors,
    fingerprint,
    new_folder,
    open_checkpoint,
    open_exported,
    read_config,
    read_json,
    read_vq_config,
    widest_dtype,
    write_model_card,
    write_shards,
)
from .text_tokenizers import read_tokenizer


EMBEDDING, HEAD, CODE_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight", "visual_head.weight"
BACKBONE = ("model.language_model.", HEAD)
# The first three rows are the published layout, the last one has transformers 5's names of the same tensors.
QWEN_KEYS = KeyMap(
    {
        "model.embed_tokens.*": "model.language_model.embed_tokens.*",
        "model.layers.*": "model.language_model.layers.*",
        "model.norm.*": "model.language_model.norm.*",
        "lm_head.*": "lm_head.*",
        "model.language_model.*": "model.language_model.*",
    },
    dropped=["visual.*", "model.visual.*"],
)
ROWS_AT_ONCE = 4096

CARD = """\
The start of a NextFlow ([arXiv 2601.02204](https://arxiv.org/abs/2601.02204)), converted from `{source}` with
transformers-nextflow. It writes text as its source does. It cannot draw yet: the connector of the visual codes and the
rows of the output head that predict them are new, and are to be trained.

```python
from transformers import AutoProcessor
from transformers_nextflow import NextFlowForConditionalGeneration

model = NextFlowForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""


def convert_qwen2_5_vl(
    source: Path | str,
    output: Path | str,
    vision_tokenizer: Path | str | None = None,
    vq_config: NextFlowVQConfig | None = None,
    base_model: str | None = None,
    max_shard_size: str = "2GB",
    seed: int = 0,
) -> Path:
    """Write a NextFlow whose backbone, text head, tokenizer and chat template are those of a Qwen2.5-VL.

    Values of the source are not changed; its vision tower is left out. One shard is in memory at a time. A run that
    was killed continues where it was when it is started again.

    Args:
        source: folder of a Qwen2.5-VL with its tokenizer, as on the Hub.
        output: folder to make.
        vision_tokenizer: folder of a trained [`NextFlowVQModel`].
        vq_config: config of a new vision tokenizer, if there is no trained one; default: that of the 7B preset.
        base_model: repository of the source on the Hub, for the model card.
        max_shard_size: bytes of a shard, such as "2GB".
        seed: seed of the new weights.

    Raises:
        ValueError: if the source is no Qwen2.5-VL, or its files are damaged, incomplete or of another layout; then
            there is no `output`.
    """
    check_repository(base_model)
    source, output = Path(source), Path(output)
    if vision_tokenizer is not None and vq_config is not None:
        raise ValueError("vision_tokenizer and vq_config were given; a trained tokenizer brings its own config.")
    qwen_config = read_qwen_config(source)
    tokenizer, rows = read_tokenizer(source), qwen_config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, its config a vocabulary of {rows}; do they belong "
            "together?"
        )
    template = _read_chat_template(source, tokenizer)
    add_image_tokens(tokenizer)
    vq_model = None
    if vision_tokenizer is not None:
        read_vq_config(vision_tokenizer)
        vq_model = NextFlowVQModel.from_pretrained(vision_tokenizer)
        vq_config = vq_model.config
    with config_errors(source):
        config = nextflow_config(qwen_config, tokenizer, vq_config or NextFlowConfig.nextflow_7b().vq_config)
    start = NextFlowInitialWeights(open_checkpoint(source), config, rows, vq_model, seed)
    config.dtype = widest_dtype(start.layout[key] for key in start.source_keys)
    if (source / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(source)
    else:
        generation_config = GenerationConfig.from_model_config(config)
    generation_config.image_sampling = {}  # the new model has no tuned settings

    plan = {
        "source": [str(source.resolve()), fingerprint(source)],
        "vision_tokenizer": vision_tokenizer and [str(Path(vision_tokenizer).resolve()), fingerprint(vision_tokenizer)],
        "config": config.to_json_string(),
        "max_shard_size": max_shard_size,
        "seed": seed,
    }
    vq_config = config.vq_config
    schedules = {"scales": vq_config.scales, "patch_size": vq_config.patch_size, "levels": vq_config.levels}
    processor = NextFlowProcessor(NextFlowImageProcessor(**schedules), tokenizer, template)
    _check_chat_template(processor, source)

    with new_folder(output, plan) as folder:
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        text = CARD.format(source=base_model or source.name, name=output.name)
        tags = ["text-to-image", "image-text-to-text", "next-scale-prediction"]
        write_model_card(folder, source, output.name, text, base_model, tags=tags, prompts=["a red circle"])
        write_shards(folder, start.layout, start.__getitem__, max_shard_size)
        check_written(folder, start.layout, start.__getitem__)
    return output


def read_qwen_config(folder: Path | str) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL. Raises `ValueError` for a folder that holds none."""
    read_config(folder, Qwen2_5_VLConfig.model_type)
    with config_errors(folder):
        return Qwen2_5_VLConfig.from_pretrained(folder)


def _read_chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that the source's processor would use, in NextFlow's form."""
    own = folder / "chat_template.json"
    if own.is_file() and not (folder / "chat_template.jinja").is_file():
        return nextflow_chat_template(read_json(own).get("chat_template"))
    return nextflow_chat_template(tokenizer.chat_template)


def _check_chat_template(processor: NextFlowProcessor, folder: Path):
    """Raises `ValueError` if the template cannot be rendered, and warns if it does not mark answers."""
    parts = [{"type": "text", "text": "a"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    try:
        processor.apply_chat_template(turns, tokenize=False)
    except ValueError as error:
        raise ValueError(f"The chat template of {folder} cannot be rendered; correct it. {error}") from error
    if "{% generation %}" not in processor.chat_template:
        warn_user(
            f"The chat template of {folder} is not of Qwen2.5-VL's form: it is kept as it is and marks no answers, as "
            "training on only the answers needs it.",
        )


def nextflow_config(
    qwen_config: Qwen2_5_VLConfig, tokenizer: PreTrainedTokenizerBase, vq_config: NextFlowVQConfig
) -> NextFlowConfig:
    """The config of a NextFlow with Qwen2.5-VL's own text config.

    `tokenizer` must have the tokens of an image. Qwen2.5-VL has more rows than tokens, and the new tokens use spare
    rows; if there are none the vocabulary grows.
    """
    text_config = qwen_config.text_config.to_dict()
    text_config["vocab_size"] = max(text_config["vocab_size"], len(tokenizer))
    return NextFlowConfig(
        text_config=text_config,
        vq_config=vq_config.to_dict(),
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=qwen_config.tie_word_embeddings,
        architectures=["NextFlowForConditionalGeneration"],
    )


def nextflow_chat_template(template: str | None) -> str | None:
    """Qwen2.5-VL's chat template with images as NextFlow lays them out, and the answers marked for training.

    `<boi>` and `<eoi>`, which the processor writes, replace Qwen's marks around an image. Text is rendered as before. A
    template of another form is returned unchanged, and marks no answers.
    """
    if template is None:
        return None
    template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
    opening, closing = "<|im_start|>{{ message['role'] }}\n", "{% endfor %}{% if add_generation_prompt %}"
    if template.count(opening) != 1 or template.count(closing) != 1:
        return template
    template = template.replace(opening, opening + "{% set turn %}")
    # The line break after a turn is not a part of the answer.
    answer = "{% generation %}{{ turn[:-1] }}{% endgeneration %}{{ '\\n' }}"
    choice = "{% if message['role'] == 'assistant' %}" + answer + "{% else %}{{ turn }}{% endif %}"
    return template.replace(closing, "{% endset %}" + choice + closing)


class NextFlowInitialWeights(Mapping):
    """The tensors of a NextFlow that starts from a Qwen2.5-VL; each is made on access.

    Args:
        source: the Qwen2.5-VL.
        config: the config of the NextFlow.
        rows: number of rows of the source's vocabulary by its config.
        vq_model: a trained vision tokenizer; default: a new one.
        seed: seed of the new weights.

    Raises:
        ValueError: if the source's tensors do not fit its config.

    Attributes:
        source_keys: name of a tensor that comes from the source → its name there.
    """

    def __init__(
        self,
        source: ShardedCheckpoint,
        config: NextFlowConfig,
        rows: int,
        vq_model: NextFlowVQModel | None = None,
        seed: int = 0,
    ):
        self.source, self.config, self._vq_model, self._seed = source, config, vq_model, seed
        with torch.device("meta"), config_errors(source.folder):
            expected = NextFlowForConditionalGeneration(config).state_dict()
        given = QWEN_KEYS.forward(source.layout)
        self.source_keys = {name: key for key in source if (name := QWEN_KEYS.forward_key(key)) is not None}
        if config.tie_word_embeddings:
            del expected[HEAD]
            self._drop_tied_head(given)
        backbone = {key: value for key, value in expected.items() if key.startswith(BACKBONE)}
        check_state(given, {key: _first_rows(key, value, rows) for key, value in backbone.items()})
        dtype = given[EMBEDDING].dtype
        self.layout: State = {
            # The tokenizer stays in float32, since its codes must not change.
            key: value if key.startswith("model.vq_model.") else value.to(given[key].dtype if key in given else dtype)
            for key, value in expected.items()
        }

    def _drop_tied_head(self, given: State):
        # Some trainers save the head although it is tied to the embeddings.
        if HEAD in given and EMBEDDING in given:
            if not torch.equal(self.source[self.source_keys[HEAD]], self.source[self.source_keys[EMBEDDING]]):
                raise ValueError(
                    f"lm_head.weight differs from the embeddings, but the config in {self.source.folder} ties them; "
                    "set tie_word_embeddings to false in it."
                )
            del given[HEAD], self.source_keys[HEAD]

    def __getitem__(self, key: str) -> torch.Tensor:
        wanted = self.layout[key]
        if key in self.source_keys:
            tensor = self.source[self.source_keys[key]]
            missing = wanted.shape[0] - tensor.shape[0] if tensor.ndim else 0
            return torch.cat([tensor, _mean_row(tensor).expand(missing, -1)]) if missing else tensor
        if key == CODE_HEAD:
            return self._mean_of_head.expand(wanted.shape).to(wanted.dtype)
        return self._new_parts[key].to(wanted.dtype)

    @cached_property
    def _mean_of_head(self) -> torch.Tensor:
        # With equal rows all codes are equally likely at first, and by Jensen's inequality no likelier than the average
        # text token, so text changes little.
        return _mean_row(self.source[self.source_keys.get(HEAD, self.source_keys[EMBEDDING])])

    @cached_property
    def _new_parts(self) -> State:
        # A model with an empty backbone initialises them by its own rules.
        config = copy.deepcopy(self.config)
        config.text_config.num_hidden_layers, config.text_config.layer_types, config.text_config.vocab_size = 0, [], 3
        config.boi_token_id, config.eoi_token_id, config.image_token_id = range(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = NextFlowForConditionalGeneration(config)
        model.load_vision_tokenizer(self._vq_model or model.vq_model)
        self._vq_model = None
        return {key: value for key, value in model.state_dict().items() if not key.startswith(BACKBONE)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def _rows(backbone: Mapping[str, torch.Tensor]) -> int:
    """Rows of the input embeddings. Raises `ValueError` if there are none."""
    if EMBEDDING not in backbone:
        raise ValueError("The input embeddings (model.embed_tokens.weight) are missing; are all shards there?")
    return backbone[EMBEDDING].shape[0]


def _first_rows(key: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor[:rows] if key in (EMBEDDING, HEAD) else tensor


def _mean_row(tensor: torch.Tensor) -> torch.Tensor:
    total = sum(part.float().sum(0, keepdim=True).double() for part in tensor.split(ROWS_AT_ONCE))
    return (total / tensor.shape[0]).to(tensor.dtype)


def export_qwen2_5_vl(
    source: Path | str,
    original: Path | str,
    output: Path | str,
    base_model: str | None = None,
    max_shard_size: str = "2GB",
) -> Path:
    """Write a Qwen2.5-VL with the backbone and text head of a NextFlow, for engines that serve Qwen2.5-VL.

    Vision tower, config, tokenizer and chat template are those of `original`, from which the NextFlow started. Rows
    that were added to the vocabulary are left out.

    Args:
        source: folder of the NextFlow, or of a pipeline of it.
        original: folder of the Qwen2.5-VL.
        output: folder to make.
        base_model: repository of the NextFlow on the Hub, for the model card.
        max_shard_size: bytes of a shard, such as "2GB".

    Raises:
        ValueError: if a folder is damaged or holds adapters, or the two models differ in size; then there is no
            `output`.
    """
    check_repository(base_model)
    source, original, output = local_part("model", source), Path(original), Path(output)
    read_qwen_config(original)
    trained, qwen = open_exported(source), open_checkpoint(original)
    backbone = {key: value for key, value in trained.layout.items() if key.startswith(BACKBONE)}
    rows = _rows(QWEN_KEYS.forward(qwen.layout))
    given = {key: _first_rows(key, value, rows) for key, value in backbone.items()}
    check_state(given, QWEN_KEYS.forward(qwen.layout))
    layout = {
        key: value if (name := QWEN_KEYS.forward_key(key)) is None else given[name]
        for key, value in qwen.layout.items()
    }

    def make(key: str) -> torch.Tensor:
        name = QWEN_KEYS.forward_key(key)
        return qwen[key] if name is None else _first_rows(name, trained[name], rows).clone()

    plan = {
        "source": [str(source.resolve()), fingerprint(source)],
        "original": [str(original.resolve()), fingerprint(original)],
        "max_shard_size": max_shard_size,
    }
    with new_folder(output, plan) as folder:
        for path in original.iterdir():
            if path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        text = (
            f"The text backbone of a NextFlow in the layout of Qwen2.5-VL, with the vision tower of `{original.name}`."
        )
        write_model_card(
            folder, source, output.name, text, base_model, "image-text-to-text", prompts=["What is a red circle?"]
        )
        write_shards(folder, layout, make, max_shard_size)
        check_written(folder, layout, make)
    return output
