"""Cases of diffusion decoders, of adapters, of what checks and marks images, of flags, and of OneCAT."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from bad_input import RIGHT, Case, Place
from checkpoints_and_recipes import MODELS, TYPED, _json
from names_and_templates import _twice
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from settings_and_surroundings import _case
from tiny import tiny_model
from tiny_diffusion import save_pipeline_folder, tiny_decoder
from tiny_onecat import tiny_onecat_config, tiny_onecat_model, tiny_onecat_processor
from words_and_calls import BOUNDS, CALLS, user

from transformers_nextflow import NextFlowPipeline, OneCatImageProcessor
from transformers_nextflow.conversion import onecat
from transformers_nextflow.diffusion_decoder import (
    DiffusionSettings,
    NextFlowDiffusionDecoder,
    decoder_on_base,
    small_decoder,
)
from transformers_nextflow.utils.saved_adapters import save_adapter


DECODERS, ADAPTERS = "diffusion decoders", "adapters"
NAN = float("nan")
CIRCLE = "a red circle"
PIXELS = np.zeros((16, 16, 3), "u1")

# --- Diffusion decoders -------------------------------------------------------------------------------------------


def _decoding(place: Place) -> NextFlowPipeline:
    pipe = NextFlowPipeline(place.pipe.model, place.pipe.processor, tiny_decoder(place.pipe.model.vq_model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _decoded(name: str, value, *words: str, kind: str = DECODERS) -> Case:
    def act(place: Place):
        return _decoding(place)(CIRCLE, decoder="diffusion", **{name: value})

    return _case(kind, f"call {name}={value!r}", act, *words)


def _decoder_folder(place: Place) -> Path:
    tiny_decoder(place.pipe.model.vq_model).save_pretrained(place.folder / "decoder")
    return place.folder / "decoder"


def _poisoned(name: str, damage: Callable[[Path], object], *words: str) -> Case:
    def act(place: Place):
        damage(folder := _decoder_folder(place))
        pipe = NextFlowPipeline.from_pretrained(place.model, diffusion_decoder=folder)
        pipe.set_progress_bar_config(disable=True)
        pipe(CIRCLE, decoder="diffusion", decoder_steps=1)

    return _case(DECODERS, f"decoder: {name}", act, *words)


def _weights(change: Callable[[torch.Tensor], torch.Tensor]):
    def damage(folder: Path):
        file = folder / "diffusion_pytorch_model.safetensors"
        stored = load_file(file)
        save_file({name: change(tensor).contiguous() for name, tensor in stored.items()}, file, {"format": "pt"})

    return damage


def _set(**values):
    return lambda folder: _json(folder / "config.json", **values)


def _config(name: str, value, *words: str) -> Case:
    return _poisoned(f"{name}={value!r}", _set(**{name: value}), *words)


def _flow(**values) -> dict:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler"} | values


def _small(name: str, value, *words: str) -> Case:
    settings = {"pixel_cell": 2, "channels": (8, 16), name: value}
    return _case(
        DECODERS, f"small decoder {name}={value!r}", lambda p: small_decoder(p.pipe.model.vq_model, **settings), *words
    )


def _base(name: str, index: dict | list, *words: str, damage=lambda folder: None) -> Case:
    def act(place: Place):
        folder = save_pipeline_folder(place.folder / "base", "text unet")
        (folder / "model_index.json").write_text(json.dumps(index))
        damage(folder)
        decoder_on_base(place.pipe.model.vq_model, folder)

    return _case(DECODERS, f"base: {name}", act, *words)


INDEX = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}

DECODER_CASES = [
    _decoded("decoder_steps", 10**9, "decoder_steps", "1000", kind=BOUNDS),
    _decoded("decoder_steps", 1001, "decoder_steps", "1000"),
    _decoded("decoder_guidance_scale", 1e30, "decoder_guidance_scale", "1000"),
    _decoded("decoder_guidance_scale", -5, "decoder_guidance_scale", "-5"),
    _case(DECODERS, "settings of 10^7 steps", lambda p: DiffusionSettings(10**7, 1.0), "decoder_steps"),
    Case(
        DECODERS, "steps and guidance of numpy",
        lambda p: _decoding(p)(CIRCLE, decoder="diffusion", decoder_steps=np.int64(1),
                               decoder_guidance_scale=np.float32(2)).images[0].save("a.png"),
        expected=RIGHT,
    ),
    _poisoned("a name twice", lambda folder: _twice("config.json")(folder), "config.json", "'repeated'", "twice"),
    _poisoned("a config that is a list", lambda f: (f / "config.json").write_text("[1]"), "config.json", "list"),
    _poisoned("tensors of integers", _weights(lambda tensor: tensor.to(torch.int32)), "I32", "floats"),
    _poisoned("weights beyond all measure", _weights(lambda tensor: tensor * 1e30), "NaN or infinity", "pixel"),
    _config("patch_size", "4", "patch_size", "'4'"),
    _config("patch_size", -4, "patch_size", "-4"),
    _config("condition_channels", None, "condition_channels", "None"),
    _config("projected_channels", 10**9, "projected_channels", "65536"),
    _config("projected_channels", 0, "projected_channels", "0"),
    _config("projection_hidden_size", "x", "projection_hidden_size", "'x'"),
    _config("pixel_cell", 0, "pixel_cell", "0"),
    _config("scheduler", 5, "scheduler", "5"),
    _config("scheduler", {}, "scheduler"),
    _config("scheduler", {"_class_name": "FlowMatchNone"}, "FlowMatchNone", "not a scheduler"),
    _config("scheduler", {"_class_name": "DiffusionPipeline"}, "DiffusionPipeline", "not a scheduler"),
    _config("scheduler", _flow(shift="x"), "scheduler"),
    _config("scheduler", _flow(shift=NAN), "scheduler.shift", "nan"),
    _config("scheduler", _flow(num_train_timesteps=0), "scheduler"),
    _config("trained_sizes", [16], "trained_sizes"),
    _config("trained_sizes", 5, "trained_sizes", "5"),
    _config("num_inference_steps", "8", "num_inference_steps", "'8'"),
    _config("num_inference_steps", 10**6, "steps", "1000"),
    _config("base", 5, "base", "5"),
    _config("base", None, "base", "None"),
    _config("base__layers_per_block", 10**6, "layers_per_block", "1000"),
    _config("base__norm_num_groups", 0, "base"),
    _config("base__block_out_channels", [], "base"),
    _small("channels", (), "channels"),
    _small("channels", "x", "channels", "'x'"),
    _small("channels", (-8, 8), "channels", "multiples of 8"),
    _small("layers", -1, "layers", "-1"),
    _small("pixel_cell", 0, "pixel_cell", "0"),
    _small("patch_cell", 1, "'patch_cell'", "patch_size"),
    _base("no scheduler", {"unet": INDEX["unet"]}, "model_index.json", "scheduler"),
    _base("a unet that is none", INDEX | {"unet": None}, "model_index.json", "unet"),
    _base("a scheduler of another kind", INDEX | {"scheduler": ["os", "system"]}, "'system'", "not a scheduler"),
    _base(
        "NaN in its weights", INDEX, "NaN", damage=lambda folder: _weights(lambda t: t * NAN)(folder / "unet"),
    ),
    _case(DECODERS, "base: None", lambda p: decoder_on_base(p.pipe.model.vq_model, None), "None", "folder"),
    _case(DECODERS, "decoder: None", lambda p: NextFlowDiffusionDecoder.from_pretrained(None), "None", "folder"),
]  # fmt: skip


# --- Calls --------------------------------------------------------------------------------------------------------


def _called(name: str, *words: str, **given) -> Case:
    return _case(CALLS, f"call: {name}", lambda place: place.pipe(CIRCLE, **given), *words)


def _returned(name: str, returned, *words: str) -> Case:
    return _case(
        CALLS, f"a callback returns {name}",
        lambda p: p.pipe(CIRCLE, callback_on_step_end=lambda pipe, step, scale, given: returned(given)), *words,
    )  # fmt: skip


def _hooked(name: str, *words: str, **hooks) -> Case:
    def act(place: Place):
        pipe = NextFlowPipeline(place.pipe.model, place.pipe.processor)
        pipe.set_progress_bar_config(disable=True)
        for hook, value in hooks.items():
            setattr(pipe, hook, value)
        return pipe(CIRCLE)

    return _case(CALLS, f"hook: {name}", act, *words)


def _marking(mark):
    return type("Watermark", (), {"apply_watermark": lambda self, images: mark(images)})()


def _checking(name: str, answer) -> Case:
    return _hooked(
        f"a checker that gives {name}", "safety_checker must return",
        safety_checker=lambda images, clip_input: answer(images),
    )  # fmt: skip


def _chatted(name: str, *words: str, message: dict | None = None, **given) -> Case:
    messages = [message or user("a")]
    return _case(CALLS, f"chat: {name}", lambda p: p.pipe.chat(messages, **{"max_new_tokens": 1} | given), *words)


def _kept(**given) -> dict:
    return {"image": PIXELS, "mask_image": np.ones((16, 16))} | given


CALL_CASES = [
    *(_called(f"{name}='no'", name, "'no'", **{name: "no"}) for name in ("return_dict", "preview")),
    _called("paste_back='no'", "paste_back", "'no'", **_kept(paste_back="no")),
    _called("codes with pixels put back", "latent", "paste_back", **_kept(paste_back=True, output_type="latent")),
    _called(
        "a dict among tensor inputs", "callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs=[{}],
    ),
    Case(CALLS, "two images by numpy", lambda p: p.pipe(CIRCLE, num_images_per_prompt=np.int64(2)), expected=RIGHT),
    _returned("other names", lambda given: {"latents": 1}, "'latents'", "image_tokens"),
    _returned("truth values", lambda given: {"image_tokens": given["image_tokens"] > 0}, "whole numbers"),
    _hooked("a checker that is 5", "safety_checker", "5", safety_checker=5),
    _hooked("an extractor that is 5", "feature_extractor", "5", feature_extractor=5),
    _hooked("provenance of 'no'", "adds_provenance", "'no'", adds_provenance="no"),
    _checking("nothing", lambda images: None),
    _checking("no flags", lambda images: (images, None)),
    _checking("words as flags", lambda images: (images, ["maybe"])),
    _checking("one flag for all", lambda images: (images, True)),
    _checking("NaN", lambda images: (images * NAN, [True])),
    _checking("values up to 255", lambda images: (images * 0 + 255, [True])),
    _hooked("a watermark that is 5", "watermark", "apply_watermark", "5", watermark=5),
    _hooked("a watermark of nothing", "watermark", "None", watermark=_marking(lambda images: None)),
    _hooked("a watermark that cuts", "watermark", watermark=_marking(lambda images: images[:, :, :4])),
    _hooked("a watermark of NaN", "watermark", watermark=_marking(lambda images: images * NAN)),
    _hooked("a watermark of numpy", "watermark", watermark=_marking(lambda images: images.numpy())),
    _case(
        CALLS, "video max_transition_tokens=None",
        lambda p: p.pipe.video(CIRCLE, num_frames=2, max_transition_tokens=None), "max_transition_tokens", "None",
    ),
    _case(
        CALLS, "video max_transition_tokens=True",
        lambda p: p.pipe.video(CIRCLE, num_frames=2, max_transition_tokens=True), "max_transition_tokens", "True",
    ),
    _chatted("generation_config=5", "generation_config", "5", generation_config=5),
    _chatted("callback=5", "callback", "5", callback=5, min_images=1),
    _chatted("a callback of one argument", "callback", "3 arguments", callback=lambda model: None, min_images=1),
    _chatted("an empty stop string", "stop_strings", "empty", stop_strings=[""]),
    _chatted(
        "a frame that is missing", "Frame 0", message={"role": "user", "content": [{"type": "video", "video": [None]}]},
    ),
    _case(
        CALLS, "generate_images(sampling=5)",
        lambda p: p.pipe.model.generate_images(torch.tensor([[1]]), image_sizes=[(16, 16)], sampling=5),
        "sampling", "5",
    ),
]  # fmt: skip


# --- Adapters -----------------------------------------------------------------------------------------------------


def _adapter(place: Place) -> Path:
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "own")
    save_adapter(model, "own", place.folder / "adapter")
    return place.folder / "adapter"


def _pipe(place: Place) -> NextFlowPipeline:
    return NextFlowPipeline(tiny_model(), place.pipe.processor)


def _loaded(name: str, damage: Callable[[Path], object], *words: str, given: tuple = ()) -> Case:
    def act(place: Place):
        damage(folder := _adapter(place))
        pipe = _pipe(place)
        try:
            pipe.load_lora_weights(folder, *given)
        except ValueError:
            assert not pipe.get_list_adapters()["model"], "half an adapter is left in the model"
            raise

    return _case(ADAPTERS, f"adapter: {name}", act, *words)


def _adapter_config(**values):
    return lambda folder: _json(folder / "adapter_config.json", **values)


def _adapter_weights(change: Callable[[torch.Tensor], torch.Tensor]):
    def damage(folder: Path):
        file = folder / "adapter_model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    return damage


def _cut(folder: Path):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _with_adapter(name: str, use: Callable[[NextFlowPipeline], object], *words: str) -> Case:
    def act(place: Place):
        pipe = _pipe(place)
        pipe.load_lora_weights(_adapter(place), "own")
        return use(pipe)

    return _case(ADAPTERS, f"adapter: {name}", act, *words)


def _beside(name: str, index, *words: str) -> Case:
    def act(place: Place):
        folder = place.copy()
        place.file("model/adapters/adapters.json", json.dumps(index))
        return place.run("generate", CIRCLE, "--model", folder)

    return _case(MODELS, f"adapters.json: {name}", act, *words)


def _nothing(folder: Path):
    pass


ADAPTER_CASES = [
    _loaded("NaN in its weights", _adapter_weights(lambda t: t * NAN), "adapter_model.safetensors", "finite"),
    _loaded("weights of integers", _adapter_weights(lambda t: t.to(torch.int32)), "adapter_model.safetensors", "int32"),
    _loaded("half its weights", _cut, "adapter"),
    _loaded("lora_alpha NaN", _adapter_config(lora_alpha=NAN), "lora_alpha", "nan"),
    _loaded("r=10^9", _adapter_config(r=10**9), "r=1000000000"),
    _loaded("a name twice", _twice("adapter_config.json"), "adapter_config.json", "'repeated'", "twice"),
    _loaded("not valid JSON", lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    _loaded("no type", lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json", "peft_type"),
    *(_loaded(f"called {name!r}", _nothing, "name", given=(name,)) for name in ("", "a/b", "/tmp/a", "\ud800")),
    _case(ADAPTERS, "adapter: None", lambda p: _pipe(p).load_lora_weights(None), "None", "folder"),
    _case(ADAPTERS, "adapter: {}", lambda p: _pipe(p).load_lora_weights({}), "{}", "folder"),
    _case(ADAPTERS, "no adapter is saved", lambda p: _pipe(p).save_lora_weights("out"), "no adapters"),
    _with_adapter("saved to a file", lambda pipe: (Path("file").touch(), pipe.save_lora_weights("file")), "is a file"),
    _with_adapter(
        "saved with more", lambda pipe: pipe.save_lora_weights("out", unet_lora_layers={}), "unet_lora_layers",
    ),
    _with_adapter("set twice", lambda pipe: pipe.set_adapters(["own", "own"], [1, 2]), "own", "once"),
    _with_adapter("fused twice", lambda pipe: (pipe.fuse_lora(0.5), pipe.fuse_lora(0.5)), "unfuse_lora"),
    _with_adapter("set while fused", lambda pipe: (pipe.fuse_lora(), pipe.set_adapters("own", 0.5)), "unfuse_lora"),
    _with_adapter("fused by number", lambda pipe: pipe.fuse_lora(adapter_names=5), "adapter_names", "5"),
    _with_adapter("fused safely='no'", lambda pipe: pipe.fuse_lora(safe_fusing="no"), "safe_fusing", "'no'"),
    _beside("a list", [], "adapters.json", "list"),
    _beside("a number for names", {"names": 5, "active": []}, "adapters.json", "names", "5"),
    _beside("no names", {"active": []}, "adapters.json", "names"),
    _beside("names out of the folder", {"names": ["../../a"], "active": []}, "name", "'../../a'"),
    _beside("another one active", {"names": [], "active": ["b"]}, "adapters.json", "'b'"),
]  # fmt: skip


# --- OneCAT -------------------------------------------------------------------------------------------------------


@lru_cache
def _onecat() -> NextFlowPipeline:
    pipe = NextFlowPipeline(tiny_onecat_model(), tiny_onecat_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _onecat_config(*words: str, part: str | None = None, **values) -> Case:
    given = {part: values} if part else values
    return _case(TYPED, f"OneCAT: {given}"[:80], lambda place: tiny_onecat_config(**given), *words)


def _written(*words: str, **given) -> Case:
    return _case(CALLS, f"OneCAT's chat {given}", lambda p: _onecat().chat([user("a")], **given), *words)


def _tokenizer_file(name: str, state: dict, *words: str) -> Case:
    def act(place: Place):
        torch.save({"vae": state}, "vae.pth")
        onecat.read_vision_tokenizer(Path("vae.pth"))

    return _case(TYPED, f"Infinity's tokenizer: {name}", act, *words)


def _infinity(first: torch.Tensor) -> dict[str, torch.Tensor]:
    """The names that tell sizes."""
    names = ("encoder.down.0.block.0.conv1.conv.weight", "encoder.conv_out.conv.weight")
    return dict.fromkeys(names, torch.zeros(8, 1)) | {"encoder.conv_in.conv.weight": first}


ONECAT_CASES = [
    _onecat_config("num_hidden_layers", "1000", part="text_config", num_hidden_layers=10**9),
    _onecat_config("num_res_blocks", "1000", part="vq_config", num_res_blocks=10**9),
    _onecat_config("channels", part="vq_config", channels=10**9),
    _onecat_config("levels", "2.5", part="vq_config", levels=[[32, 2.5]]),
    _onecat_config("levels", "'32'", part="vq_config", levels=[["32", "2"]]),
    _onecat_config("adapter_rank", adapter_rank=10**9),
    _onecat_config("initializer_range", "-1", initializer_range=-1.0),
    _onecat_config("two tokens", "307", image_token_id=307, reference_token_id=307),
    _onecat_config("image_sampling", "'heat'", image_sampling={"heat": 1}),
    _onecat_config("image_sampling", "temperature", image_sampling={"temperature": "hot"}),
    _case(TYPED, "OneCAT: scales=5", lambda p: OneCatImageProcessor(scales=5), "sides", "5"),
    _case(TYPED, "OneCAT: levels=5", lambda p: OneCatImageProcessor(levels=5), "levels", "5"),
    _written("max_new_tokens", "'x'", max_new_tokens="x"),
    _written("top_p", "5", top_p=5.0, do_sample=True),
    _written("do_sample", "'no'", do_sample="no"),
    _written("num_beams", "0", num_beams=0),
    _written("eos_token_id", "'x'", eos_token_id="x"),
    _written("return_dict_in_generate", return_dict_in_generate=True),
    _written("generation_config", "5", generation_config=5),
    _written("input_ids", input_ids=1),
    _tokenizer_file("a tensor without axes", _infinity(torch.tensor(1.0)), "vae.pth", "sizes"),
    _tokenizer_file("no channels", _infinity(torch.zeros(0)), "vae.pth", "sizes"),
    _tokenizer_file("numbers for names", {5: torch.zeros(1)}, "vae.pth"),
]  # fmt: skip

CASES = [*DECODER_CASES, *CALL_CASES, *ADAPTER_CASES, *ONECAT_CASES]
