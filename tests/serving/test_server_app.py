"""The endpoints, without a cluster: what is called through the server is what the pipeline is called with."""

import asyncio
import base64
import io
import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image


pytest.importorskip("fastapi", reason="needs the extra serve")

from starlette.testclient import TestClient  # noqa: E402
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor  # noqa: E402

from transformers_nextflow import NextFlowPipeline  # noqa: E402
from transformers_nextflow.serving import loading  # noqa: E402
from transformers_nextflow.serving.app import create_app  # noqa: E402
from transformers_nextflow.serving.body_limits import BodyLimits, RequestBodyError  # noqa: E402
from transformers_nextflow.serving.jobs import END, ChatJob, Finished, ImageJob, Partial  # noqa: E402
from transformers_nextflow.serving.loading import load_pipeline  # noqa: E402
from transformers_nextflow.serving.schemas import ChatBody, region_of  # noqa: E402
from transformers_nextflow.serving.settings import ServingSettings  # noqa: E402
from transformers_nextflow.serving.worker import TextBeforeStop, TooManyRequests, Worker, preview_scales  # noqa: E402
from transformers_nextflow.utils.older_transformers import SANITIZES_CONTROL_TOKENS  # noqa: E402


BUNDLED = str(Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes")
IMAGES, EDITS, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(BUNDLED, "cpu")


@pytest.fixture(scope="module")
def client(pipe):
    settings = ServingSettings(BUNDLED, max_batch_size=4, max_upload=100_000)
    with TestClient(create_app(Worker(pipe, settings)), raise_server_exceptions=False) as client:
        yield client


def encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def png(image: Image.Image) -> bytes:
    return encoded(image, "PNG")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def decoded(answer: dict) -> bytes:
    return base64.b64decode(answer["b64_json"])


def events(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def answers_of(job) -> list:
    """What was put for a job by now."""
    answers = []
    while not job.answers.empty():
        answers.append(job.answers.get_nowait())
    return answers


def test_an_image_of_the_server_is_the_pipelines_for_the_same_seed(client, pipe):
    answer = client.post(IMAGES, json={"prompt": "a red circle", "seed": 3, "n": 2, "temperature": 1.0}).json()
    own = pipe(["a red circle"] * 2, generator=seeded(3, 4), temperature=1.0).images
    assert [decoded(image) for image in answer["data"]] == [png(image) for image in own]
    assert [image["seed"] for image in answer["data"]] == [3, 4]
    assert answer["size"] == "64x64" and answer["usage"]["output_tokens"] > 0


def test_requests_of_one_batch_are_answered_as_each_is_alone(pipe):
    async def batch() -> list[Image.Image]:
        prompts = ["a red circle", "a blue square and a green triangle", "two yellow circles"]
        jobs = [ImageJob(prompt=prompt, seeds=[5 + n]) for n, prompt in enumerate(prompts)]
        jobs.append(ImageJob(prompt="a red circle", seeds=[1, 2], options={"temperature": 1.0}))
        jobs.append(ImageJob(prompt="a red circle", options={"guidance_scale": -1.0}))  # refused, and only this one
        await Worker(pipe, ServingSettings(BUNDLED)).run(jobs)
        await asyncio.sleep(0)
        for job, prompt in zip(jobs, prompts):
            image, end = answers_of(job)
            assert png(image.image) == png(pipe(prompt, generator=seeded(image.seed)).images[0]) and end is END
        hot = pipe(["a red circle"] * 2, generator=seeded(1, 2), temperature=1.0).images
        assert [png(answer.image) for answer in answers_of(jobs[3])[:-1]] == [png(image) for image in hot]
        (error,) = answers_of(jobs[4])
        assert isinstance(error, ValueError) and "guidance_scale" in str(error)

    asyncio.run(batch())


def test_a_request_that_the_pipeline_fails_at_leaves_the_others_of_its_batch(pipe, monkeypatch):
    draw = Worker._draw

    def fails_at_seven(self, jobs):
        if any(job.seeds == [7] for job in jobs):
            raise ValueError("seven")
        draw(self, jobs)

    monkeypatch.setattr(Worker, "_draw", fails_at_seven)

    async def batch():
        jobs = [ImageJob(prompt="a red circle", seeds=[seed]) for seed in (6, 7, 8)]
        await Worker(pipe, ServingSettings(BUNDLED)).run(jobs)
        await asyncio.sleep(0)
        first, (error,), last = map(answers_of, jobs)
        assert str(error) == "seven"
        for (image, end), seed in ((first, 6), (last, 8)):
            assert end is END and png(image.image) == png(pipe("a red circle", generator=seeded(seed)).images[0])

    asyncio.run(batch())


def test_what_is_checked_before_replicas_start_takes_no_memory_of_their_gpu(pipe, monkeypatch):
    moved = []
    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(loading, "on_device", lambda moves, device: moved.append((moves, device)))
    loading.check_loadable(BUNDLED, "cuda:0")
    assert [(type(moves), device) for moves, device in moved] == [
        (torch.Tensor, "cuda:0"), (NextFlowPipeline, "cpu"),
    ] and moved[0][0].numel() == 0  # fmt: skip


def test_requests_are_tried_alone_when_the_memory_of_their_batch_is_free_again(pipe, monkeypatch):
    class Activations:
        pass

    held = []

    def fills_the_memory(self, jobs):
        if len(jobs) > 1:
            activations = Activations()
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("full")
        assert held[0]() is None

    monkeypatch.setattr(Worker, "_draw", fills_the_memory)

    async def batch():
        jobs = [ImageJob(prompt="a red circle") for _ in range(2)]
        await Worker(pipe, ServingSettings(BUNDLED)).run(jobs)
        await asyncio.sleep(0)
        assert [answers_of(job) for job in jobs] == [[END], [END]]

    asyncio.run(batch())


def test_a_request_without_a_seed_has_one_of_its_own_that_draws_it_again(client):
    first = client.post(IMAGES, json={"prompt": "a red circle", "temperature": 2.0}).json()["data"][0]
    again = client.post(IMAGES, json={"prompt": "a red circle", "temperature": 2.0, "seed": first["seed"]}).json()
    assert again["data"][0] == first


def test_a_stream_of_images_shows_previews_and_ends_with_the_image(client):
    body = {"prompt": "a red circle", "seed": 3, "n": 2}
    streamed = events(client.post(IMAGES, json=body | {"stream": True, "partial_images": 2}).text)
    assert [(event["type"].rpartition(".")[2], event.get("partial_image_index")) for event in streamed] == [
        ("partial_image", 0), ("partial_image", 0), ("partial_image", 1), ("partial_image", 1),
        ("completed", None), ("completed", None),
    ]  # fmt: skip
    whole = client.post(IMAGES, json=body).json()["data"]
    assert [event["b64_json"] for event in streamed[4:]] == [image["b64_json"] for image in whole]
    assert streamed[0]["b64_json"] != streamed[4]["b64_json"]
    alone = client.post(IMAGES, json=body | {"n": 1}).json()
    assert [event.get("usage") for event in streamed] == [None] * 4 + [alone["usage"]] * 2


@pytest.mark.parametrize("count, scales", [(0, []), (1, [3]), (3, [1, 3, 5]), (16, list(range(8)))])
def test_previews_are_spread_over_the_scales_and_never_the_image_itself(count, scales):
    assert preview_scales(9, count) == scales


def test_an_edit_of_the_server_is_the_pipelines(client, pipe):
    image = pipe("a red circle", generator=seeded(0)).images[0]
    region = Image.new("L", image.size)
    region.paste(255, (0, 0, 32, 64))
    transparent = image.convert("RGBA")
    transparent.putalpha(region.point(lambda light: 255 - light))
    fields = {"prompt": "make the red circle blue", "seed": "7", "paste_back": "true"}
    files = {"image": ("image.png", png(image)), "mask": ("mask.png", png(transparent))}
    answer = client.post(EDITS, data=fields, files=files).json()
    prompt, options = "make the red circle blue", {"image": image, "paste_back": True}
    own = pipe(prompt, mask_image=region, generator=seeded(7), **options).images[0]
    assert decoded(answer["data"][0]) == png(own)
    # The circle lies inside of the region.
    opposite = region.point(lambda light: 255 - light)
    assert png(own) != png(pipe(prompt, mask_image=opposite, generator=seeded(7), **options).images[0])
    unmasked = client.post(EDITS, data={"prompt": "make it blue", "seed": 7}, files=[("image[]", png(image))]).json()
    assert decoded(unmasked["data"][0]) == png(pipe("make it blue", image=image, generator=seeded(7)).images[0])


def test_a_mask_without_transparency_is_light_where_is_drawn():
    mask = Image.new("L", (4, 4), 200)
    assert region_of(mask) is mask


def test_a_chat_of_the_server_is_the_pipelines(client, pipe):
    image = pipe("a red circle", generator=seeded(0)).images[0]
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    question = [{"role": "user", "content": [part, {"type": "text", "text": pipe.processor.caption_request}]}]
    answer = client.post(CHAT, json={"messages": question, "temperature": 0}).json()["choices"][0]["message"]
    asked = [{"type": "image", "image": image}, {"type": "text", "text": pipe.processor.caption_request}]
    own = pipe.chat([{"role": "user", "content": asked}], do_sample=False)
    assert answer["content"] == "".join(part["text"] for part in own["content"] if part["type"] == "text") != ""
    request = [{"role": "user", "content": "draw a red circle."}]
    drawn = client.post(CHAT, json={"messages": request, "seed": 5}).json()["choices"][0]["message"]
    own = pipe.chat(
        [{"role": "user", "content": [{"type": "text", "text": "draw a red circle."}]}], generator=seeded(5)
    )
    own_image = next(part["image"] for part in own["content"] if part["type"] == "image")
    assert drawn["images"][0]["image_url"]["url"] == data_url(own_image)
    # What was answered can be sent back.
    longer = [*request, {"role": "assistant", **drawn}, {"role": "user", "content": "make the red circle blue."}]
    assert client.post(CHAT, json={"messages": longer, "seed": 5}).status_code == 200


@pytest.mark.parametrize("text", ["draw a red circle", "what is a circle?"])
def test_the_usage_of_a_chat_is_the_same_streamed_and_whole(client, pipe, text):
    body = {"messages": [{"role": "user", "content": text}], "seed": 3, "max_tokens": 12}
    whole = client.post(CHAT, json=body).json()
    chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    read = pipe.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    images = whole["choices"][0]["message"].get("images", [])
    codes = pipe.processor.image_processor.scale_schedules.for_size(64, 64).num_tokens * len(images)
    usage = whole["usage"]
    assert usage["prompt_tokens"] == len(read["input_ids"][0]) and usage["completion_tokens"] >= codes
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post(CHAT, json=streamed).text)
    assert last["choices"] == [] and last["usage"] == usage and all(chunk["usage"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in events(client.post(CHAT, json=body | {"stream": True}).text))


REFUSED = {
    "output_compression": (IMAGES, {"prompt": "a red circle", "output_compression": 50}),
    "partial_images": (IMAGES, {"prompt": "a red circle", "partial_images": 2}),
    "stream_options": (CHAT, {"stream_options": {"include_usage": True}}),
    "stream_options.include_obfuscation": (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}),
    "stream_options.usage": (CHAT, {"stream": True, "stream_options": {"usage": True}}),
    "modalities": (CHAT, {"modalities": ["image"]}),
    "max_completion_tokens": (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}),
}


def test_a_message_may_have_empty_fields_of_other_models(client):
    said = {"role": "assistant", "content": "yes", "audio": None, "tool_calls": None, "annotations": None}
    messages = [{"role": "user", "content": "a red circle"}, said, {"role": "user", "content": "a red circle"}]
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 1, "max_images": 0}).status_code == 200


def test_an_answer_with_top_p_is_sampled():
    def options(**fields):
        return ChatBody(messages=[{"role": "user", "content": "a"}], max_images=0, **fields).options

    assert options(top_p=0.5) == {"max_images": 0, "do_sample": True, "top_p": 0.5}
    assert options(top_p=0.5, temperature=0.0) == {"max_images": 0, "do_sample": False, "top_p": 0.5}
    assert options(temperature=2.0) == {"max_images": 0, "do_sample": True, "temperature": 2.0}


@pytest.mark.parametrize("param", REFUSED)
def test_what_would_not_be_followed_is_refused_by_name(client, param):
    path, body = REFUSED[param]
    body = body if path == IMAGES else body | {"messages": [{"role": "user", "content": "a red circle"}]}
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"].startswith(f"{param}: ")


def test_a_compression_of_png_that_changes_nothing_is_taken(client):
    body = {"prompt": "a red circle", "seed": 3}
    plain, asked = (client.post(IMAGES, json=body | more).json() for more in ({}, {"output_compression": 100}))
    assert plain["data"] == asked["data"]


@pytest.mark.filterwarnings("ignore:The prompt has words")  # one of the texts has
@pytest.mark.parametrize("text", ["draw a red circle.", "hello"])
def test_a_streamed_chat_is_the_whole_ones_in_pieces(client, text):
    body = {"messages": [{"role": "user", "content": text}], "seed": 1, "temperature": 0}
    whole = client.post(CHAT, json=body).json()["choices"][0]["message"]
    chunks = events(client.post(CHAT, json=body | {"stream": True, "partial_images": 1}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"]
    images = [image for delta in deltas for image in delta.get("images", [])]
    finished = [image for image in images if "partial_image_index" not in image]
    assert finished == whole.get("images", []) and len(images) == 2 * len(finished)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.filterwarnings("ignore:The prompt has words")
def test_an_answer_ends_before_a_stop_streamed_or_not(client):
    body = {"messages": [{"role": "user", "content": "hello"}], "seed": 1, "temperature": 0, "modalities": ["text"]}
    full = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    middle = len(full) // 2
    assert middle > 2
    stops = [full[middle : middle + 3], "never said"]
    before = full[: full.index(stops[0])]
    assert client.post(CHAT, json=body | {"stop": stops}).json()["choices"][0]["message"]["content"] == before
    chunks = events(client.post(CHAT, json=body | {"stop": stops, "stream": True}).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == before


@pytest.mark.parametrize("limit, reason", [({"max_tokens": 1, "modalities": ["text"]}, "length"), ({}, "stop")])
def test_an_answer_says_whether_the_limit_of_its_tokens_has_cut_it(client, limit, reason):
    body = {"messages": [{"role": "user", "content": "draw a red circle."}], "temperature": 0} | limit
    assert client.post(CHAT, json=body).json()["choices"][0]["finish_reason"] == reason
    chunks = events(client.post(CHAT, json=body | {"stream": True}).text)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [reason]


def test_a_model_that_only_writes_in_chats_is_served_as_well():
    pipe = NextFlowPipeline(model=tiny_onecat_model(), processor=tiny_onecat_processor())
    pipe.model.generation_config.eos_token_id = pipe.processor.end_token_id
    client = TestClient(create_app(Worker(pipe, ServingSettings(BUNDLED))), raise_server_exceptions=False)
    body = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 12, "temperature": 1.0, "seed": 5}
    state = torch.get_rng_state()
    whole = client.post(CHAT, json=body).json()
    assert torch.equal(torch.get_rng_state(), state)
    [choice] = whole["choices"]
    text = choice["message"]["content"]
    assert len(text) > 4 and choice["finish_reason"] == "length" and "images" not in choice["message"]
    assert client.post(CHAT, json=body).json()["choices"] == [choice]
    assert client.post(CHAT, json=body | {"seed": 6}).json()["choices"] != [choice]
    chunks = events(client.post(CHAT, json=body | {"stream": True, "max_images": 2}).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).strip() == text
    stopped = client.post(CHAT, json=body | {"stop": text[2:4]}).json()["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(text[2:4])] and stopped["finish_reason"] == "stop"
    refused = client.post(CHAT, json=body | {"size": "64x64"})
    assert refused.status_code == 400 and "height, width" in refused.json()["error"]["message"]


def test_a_text_in_pieces_is_held_back_where_a_stop_may_begin():
    before = TextBeforeStop(["END.", "stop"])
    assert [before(piece) for piece in ("a s", "top", "ped")] == ["a ", "", ""]
    before = TextBeforeStop("END.")
    assert [before(piece) for piece in ("a E", "N", " b EN", "D. c")] == ["a ", "", "EN b ", ""]
    before = TextBeforeStop(None)
    assert [before("any"), before("", is_end=True)] == ["any", ""]
    before = TextBeforeStop("END.")
    assert [before("b END"), before("", is_end=True)] == ["b ", "END"]


def test_without_the_modality_of_images_a_chat_draws_none(client):
    body = {"messages": [{"role": "user", "content": "draw a red circle."}], "modalities": ["text"], "max_tokens": 4}
    assert "images" not in client.post(CHAT, json=body).json()["choices"][0]["message"]


PATH = {"type": "image_url", "image_url": {"url": f"{BUNDLED}/text_to_image.png"}}


@pytest.mark.parametrize(
    "endpoint, body, status, told",
    [
        (IMAGES, {}, 400, "prompt"),
        (IMAGES, {"prompt": ""}, 400, "prompt"),
        (IMAGES, {"prompt": " "}, 400, "empty"),
        (IMAGES, {"prompt": 5}, 400, "prompt"),
        (IMAGES, {"prompt": "x" * 40_000}, 400, "32000"),
        (IMAGES, {"prompt": "a red circle " * 2000}, 400, "positions"),
        (IMAGES, {"prompt": "a", "sizes": "64x64"}, 400, "sizes: this field is not known"),
        (IMAGES, {"prompt": "a", "size": "64"}, 400, "WIDTHxHEIGHT"),
        (IMAGES, {"prompt": "a", "size": "65x64"}, 400, "nearest"),
        (IMAGES, {"prompt": "a", "size": "99999x99999"}, 400, "99999"),
        (IMAGES, {"prompt": "a", "n": 5}, 400, "at most 4"),
        (IMAGES, {"prompt": "a", "n": 0}, 400, "n:"),
        (IMAGES, {"prompt": "a", "n": 10**9}, 400, "n:"),
        (IMAGES, {"prompt": "a", "seed": -1}, 400, "seed"),
        (IMAGES, {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        (IMAGES, {"prompt": "a", "guidance_scale": 1e9}, 400, "guidance_scale"),
        (IMAGES, {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, 400, "negative_prompt"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, 400, "response_format"),
        (IMAGES, {"prompt": "a", "quality": "high"}, 400, "quality"),
        (IMAGES, {"prompt": "a", "image": "/etc/passwd"}, 400, "image"),
        (IMAGES, {"prompt": "a", "model": "another"}, 404, "another"),
        (IMAGES, [], 400, "object"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": ["hi"]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "pirate", "content": "hi"}]}, 400, "role"),
        (CHAT, {"messages": [{"role": ["user"], "content": "hi"}]}, 400, "role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "content"),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "tool_calls": []}]}, 400, "tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": [PATH]}]}, 400, "data:image/png;base64"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "data:image/png;base64"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "input_audio"),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "n": 2}, 400, "n:"),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "stop": [""]}, 400, "stop"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_is_wrong_with_it(client, endpoint, body, status, told):
    answer = client.post(endpoint, json=body)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://127.0.0.1:1/a.png", "data:image/png;base64,AAAA", "data:,"]
)
def test_an_image_of_a_chat_comes_with_the_request(client, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400 and "messages[0].content[0].image_url.url" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "files, told",
    [
        ([], "at least one image"),
        ([("image", b"no image")], "image"),
        ([("images", b"")], "images"),
        ([("image", encoded(Image.new("RGB", (8, 8)), "TIFF"))], "none of PNG, JPEG, WEBP, GIF"),
        ([("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")], "none of PNG, JPEG"),
        ([("image[]", png(Image.new("RGB", (8, 8))))] * 17, "at most 16 images"),
        ([*[("image", png(Image.new("L", (8, 8))))] * 2, ("mask", png(Image.new("L", (8, 8))))], "at most 1 images"),
        ([("image", png(Image.new("RGB", (64, 64)))), ("mask", png(Image.new("L", (8, 8))))], "8x8"),
        ([("image", png(Image.new("RGB", (64, 64)))), *[("mask", png(Image.new("L", (8, 8))))] * 2], "at most one"),
    ],
)  # fmt: skip
def test_a_bad_edit_is_told_what_is_wrong_with_it(client, files, told):
    answer = client.post(EDITS, data={"prompt": "make it blue"}, files=files)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text


def test_a_field_that_is_given_twice_is_refused(client):
    answer = client.post(EDITS, data={"prompt": ["a", "b"]}, files=[("image", png(Image.new("RGB", (64, 64))))])
    assert answer.status_code == 400 and "'prompt' is given twice" in answer.json()["error"]["message"]


def test_images_that_are_small_files_are_counted_before_they_fill_the_memory(client, monkeypatch):
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image.size) or load(image))
    part = {"type": "image_url", "image_url": {"url": data_url(Image.new("1", (4000, 4000)))}}
    content = [part] * 5
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and "content[4].image_url.url: the base64 has 4000x4000" in answer.text
    assert len(decoded) == 4
    small = {"type": "image_url", "image_url": {"url": data_url(Image.new("1", (4, 4)))}}
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": [small] * 100}]})
    assert answer.status_code == 400 and "at most 16 images" in answer.text and len(decoded) == 20


def test_texts_of_a_chat_are_bounded_together(pipe):
    client = TestClient(create_app(Worker(pipe, ServingSettings(BUNDLED))), raise_server_exceptions=False)
    messages = [{"role": "user", "content": "a" * 250_000}] * 2
    answer = client.post(CHAT, json={"messages": messages})
    assert answer.status_code == 400 and "400000 characters" in answer.text


def test_a_body_that_is_announced_too_long_is_not_waited_for():
    async def never() -> dict:
        await asyncio.sleep(60)

    async def read(scope, receive, send):
        await receive()

    scope = {"type": "http", "headers": [(b"content-length", b"99999999999")]}
    with pytest.raises(RequestBodyError) as refused:
        asyncio.run(BodyLimits(read, max_bytes=10, seconds=30)(scope, never, None))
    assert refused.value.status == 413


def test_what_is_no_json_and_what_is_too_long_is_refused(client):
    assert client.post(IMAGES, content=b'{"prompt": "a').status_code == 400
    assert client.post(IMAGES, content=b"\xff").status_code == 400
    assert client.post(IMAGES, content=b"[" * 100_000).status_code == 400
    assert client.post(IMAGES, json={"prompt": "a" * 200_000}).status_code == 413
    assert client.post(EDITS, data={"prompt": "a"}, files=[("image", b"a" * 200_000)]).status_code == 413


@pytest.mark.skipif(not SANITIZES_CONTROL_TOKENS, reason="this transformers would obey it, so it is refused")
def test_text_never_becomes_a_special_token(client, pipe):
    token = pipe.processor.tokenizer.special_tokens_map["boi_token"]
    body = {
        "messages": [{"role": "user", "content": f"hello {token}"}],
        "temperature": 0,
        "max_tokens": 4,
        "max_images": 0,
    }
    own = [{"role": "user", "content": [{"type": "text", "text": f"hello {token}"}]}]
    own = pipe.chat(own, do_sample=False, max_new_tokens=4, max_images=0)["content"]
    answer = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert answer == "".join(part["text"] for part in own)


def held_worker(pipe, **limits) -> tuple[Worker, asyncio.Event]:
    """A worker that begins no batch before the event is set."""
    begin = asyncio.Event()
    worker = Worker(pipe, ServingSettings(BUNDLED, **limits))

    async def schedule(job):
        await begin.wait()
        await worker.run([job])

    worker.schedule = schedule
    return worker, begin


def test_more_requests_than_are_admitted_are_told_when_to_come_again(pipe):
    async def requests():
        worker, begin = held_worker(pipe, max_waiting=2)
        jobs = [ImageJob(prompt="a red circle") for _ in range(3)]
        waiting = [asyncio.create_task(anext(worker.answers(job))) for job in jobs[:2]]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests) as refused:
            await anext(worker.answers(jobs[2]))
        assert refused.value.retry_after >= 1
        begin.set()
        assert all(isinstance(answer, Finished) for answer in await asyncio.gather(*waiting))

    asyncio.run(requests())


def test_a_busy_server_answers_429_and_when_to_come_again(pipe):
    worker = Worker(pipe, ServingSettings(BUNDLED, max_waiting=1))
    worker.waiting = 1
    answer = TestClient(create_app(worker)).post(IMAGES, json={"prompt": "a red circle"})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1


def test_an_answer_that_takes_too_long_is_given_up(pipe):
    async def late():
        worker, begin = held_worker(pipe, timeout=0.05)
        with pytest.raises(TimeoutError):
            await anext(worker.answers(job := ImageJob(prompt="a red circle")))
        assert job.abandoned and worker.waiting == 0
        begin.set()

    asyncio.run(late())


def test_when_the_client_leaves_the_drawing_ends_after_the_scale_at_hand(pipe, monkeypatch):
    scales = []

    async def leave():
        worker = Worker(pipe, ServingSettings(BUNDLED))
        job = ImageJob(prompt="a red circle", partial_images=16)
        own_put, drawn = job.put, threading.Event()

        def put(answer):
            scales.append(answer)
            own_put(answer)
            drawn.wait(5)

        monkeypatch.setattr(job, "put", put)
        answers = worker.answers(job)
        assert isinstance(await anext(answers), Partial)
        await answers.aclose()
        drawn.set()
        worker.thread.shutdown()

    asyncio.run(leave())
    assert sum(isinstance(answer, Partial) for answer in scales) == 1


def test_a_request_that_nobody_waits_for_is_not_begun(pipe, monkeypatch):
    async def abandoned():
        worker = Worker(pipe, ServingSettings(BUNDLED))
        job = ChatJob(messages=[{"role": "user", "content": "hello"}])
        job.abandoned = True
        monkeypatch.setattr(pipe, "chat", lambda *args, **kwargs: pytest.fail("begun"))
        await worker.run([job])

    asyncio.run(abandoned())


def test_what_the_server_fails_at_is_told_without_what_it_holds(client, pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(pipe.model, "generate_images", fail)
    answer = client.post(IMAGES, json={"prompt": "a red circle"})
    assert answer.status_code == 500 and "secret" not in answer.text
    streamed = client.post(IMAGES, json={"prompt": "a red circle", "stream": True})
    assert streamed.status_code == 500


def test_a_body_that_does_not_arrive_is_not_waited_for():
    async def receive():
        await asyncio.sleep(5)

    async def read(scope, receive, send):
        await receive()

    with pytest.raises(RequestBodyError) as refused:
        asyncio.run(BodyLimits(read, max_bytes=10, seconds=0.01)({"type": "http"}, receive, None))
    assert refused.value.status == 408


@pytest.mark.parametrize("setting", [{"max_batch_size": 0}, {"timeout": float("nan")}, {"max_waiting": 1.5}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ServingSettings(BUNDLED, **setting)
