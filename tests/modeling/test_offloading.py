"""Offloaded models do what whole ones do, and nothing stays where it was brought."""

import accelerate
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor, tiny_vq_config
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import NextFlowPipeline, NextFlowVQModel
from transformers_nextflow.vision_tokenizer.fingerprint import tokenizer_fingerprint


CPU = torch.device("cpu")
RED, WIDE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (32, 8), "blue")
MASK = Image.new("L", (16, 16))
MASK.paste(255, (4, 4, 12, 12))
PARTS = ("model.language_model", "model.visual_embedding", "model.vq_model", "lm_head", "visual_head")
DEEDS = {
    "draw": lambda pipe: draw(pipe),
    "edit": lambda pipe: draw(pipe, image=[WIDE, RED], image_guidance_scale=1.5),
    "draw in a mask": lambda pipe: draw(pipe, image=RED, mask_image=MASK),
    "vary": lambda pipe: draw(pipe, image=RED, num_kept_scales=2),
    "rank": lambda pipe: draw(pipe, num_candidates=2),
    "score": lambda pipe: pipe.score([RED, WIDE], ["a red circle", "one"]).image_given_text,
    "describe": lambda pipe: pipe.score([RED, WIDE], ["a red circle", "one"]).text_given_image,
    "video": lambda pipe: pixels(pipe.video("one", RED, 2, max_transition_tokens=2, generator=seeded()).frames[0]),
    "script": lambda pipe: pixels(pipe.video([["one", "a star"]], image=[RED], generator=seeded()).frames[0]),
    "chat": lambda pipe: chat(pipe),
    "answer": lambda pipe: pipe.model.generate(**question(pipe), max_new_tokens=4, do_sample=False),
    "loss": lambda pipe: pipe.model(**question(pipe), labels=question(pipe)["input_ids"]).loss.detach(),
}


def seeded():
    return torch.Generator().manual_seed(0)


def draw(pipe, **kwargs):
    """Codes, and the images and previews that they decode to."""
    seen = []
    output = pipe(
        "a red circle", guidance_scale=2.0, generator=seeded(), output_type="pt",
        callback_on_step_end=lambda *arguments: seen.append(arguments[-1]["preview"].flatten()),
        callback_on_step_end_tensor_inputs=["preview"], **kwargs,
    )  # fmt: skip
    return torch.cat([output.image_tokens.flatten(), output.images.flatten(), *seen])


def pixels(images):
    return torch.tensor([list(image.tobytes()) for image in images])


def chat(pipe):
    content = [{"type": "image", "image": WIDE}, {"type": "text", "text": "one"}]
    message = pipe.chat([{"role": "user", "content": content}], 2, min_images=1, generator=seeded())
    return pixels([part["image"] for part in message["content"] if part["type"] == "image"])


def question(pipe):
    return pipe.processor(text="<|image_pad|> how many?", images=RED, return_tensors="pt")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    pipe = quiet(NextFlowPipeline.from_pretrained(folder))
    return {name: deed(pipe) for name, deed in DEEDS.items()}


@pytest.fixture(scope="module", params=["cpu", "disk", "tokenizer on disk", "heads on disk", "little memory", "hook"])
def offloaded(request, folder, tmp_path_factory):
    way, offload_folder = request.param, tmp_path_factory.mktemp("offload")
    if way in ("cpu", "disk", "hook"):
        pipe = quiet(NextFlowPipeline.from_pretrained(folder))
        if way == "cpu":  # what diffusers' sequential offloading does
            accelerate.cpu_offload(pipe.model, CPU)
        elif way == "disk":
            accelerate.disk_offload(pipe.model, offload_folder, CPU)
        else:
            pipe.enable_model_cpu_offload(device="cpu")
        return pipe
    options = {"device_map": "auto", "max_memory": {"cpu": "120KB"}}
    if way != "little memory":
        on_disk = {"tokenizer on disk": ["model.vq_model"], "heads on disk": ["lm_head", "visual_head", PARTS[1]]}[way]
        options = {"device_map": {part: "disk" if part in on_disk else "cpu" for part in PARTS}}
    return quiet(NextFlowPipeline.from_pretrained(folder, offload_folder=offload_folder, **options))


@pytest.mark.parametrize("deed", DEEDS)
def test_an_offloaded_model_does_what_a_whole_one_does(offloaded, whole, deed):
    where = {name: parameter.device for name, parameter in offloaded.model.named_parameters()}
    assert torch.equal(DEEDS[deed](offloaded), whole[deed])
    assert offloaded.model.device == offloaded.model.vq_model.device == CPU
    assert where == {name: parameter.device for name, parameter in offloaded.model.named_parameters()}


@pytest.mark.parametrize("semantic", ["siglip_vision_model", "siglip2_vision_model", "clip_vision_model"])
@torch.no_grad()
def test_an_offloaded_tokenizer_reads_and_writes_the_same_codes_with_every_encoder(semantic):
    sizes = {"num_patches": 16} if semantic.startswith("siglip2") else {"image_size": 16}
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": semantic, "patch_size": 4} | values | sizes
    model = NextFlowVQModel(tiny_vq_config(semantic_config=config)).eval()
    images = torch.rand(2, 3, 12, 24) * 2 - 1
    schedule, codes, output = model.schedule_of(images), model.encode(images).image_tokens, model(images)
    decoded, fingerprint = model.decode(codes, schedule), tokenizer_fingerprint(model)
    accelerate.cpu_offload(model, CPU)
    assert torch.equal(model.encode(images).image_tokens, codes)
    assert torch.equal(model.decode(codes, schedule), decoded)
    assert torch.equal(model(images).semantic_features, output.semantic_features)
    assert tokenizer_fingerprint(model) == fingerprint
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_offloaded_tokenflow_t2i_draws_the_same_image():
    pipe = quiet(NextFlowPipeline(tiny_t2i_model(), tiny_t2i_processor()))
    expected = draw(pipe)
    accelerate.cpu_offload(pipe.model, CPU)
    assert torch.equal(draw(pipe), expected)
    assert all(parameter.is_meta for parameter in pipe.model.parameters())


FAILING = {
    "a callback": lambda pipe: pipe("one", callback_on_step_end=lambda *_: fail()),
    "a scorer": lambda pipe: pipe("one", num_candidates=2, candidate_scorer=lambda *_: fail()),
    "a video": lambda pipe: pipe.video("one", num_frames=2),
    "a chat": lambda pipe: pipe.chat([{"role": "user", "content": "one"}], max_new_tokens=1, min_images=1),
    "a score": lambda pipe: pipe.score([RED], ["one"]),
}


def fail(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", FAILING)
def test_a_call_frees_the_model_whatever_ends_it(call, monkeypatch):
    pipe, freed = quiet(NextFlowPipeline(tiny_model(), tiny_processor())), []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(self))
    for name in ("get_image_tokens", "decode_image_tokens"):
        monkeypatch.setattr(pipe.model, name, fail)
    with pytest.raises(KeyboardInterrupt):
        FAILING[call](pipe)
    assert freed == [pipe]
