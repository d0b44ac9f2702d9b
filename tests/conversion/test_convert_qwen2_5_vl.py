"""Qwen2.5-VL to NextFlow and back: the same logits, texts and tensors; damaged files leave nothing behind."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_vq_config
from transformers import AutoProcessor, AutoTokenizer

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.conversion import qwen2_5_vl as conversion_qwen2_5_vl
from transformers_nextflow.conversion.checkpoints import INDEX, SINGLE, ShardedCheckpoint
from transformers_nextflow.conversion.qwen2_5_vl import convert_qwen2_5_vl, export_qwen2_5_vl, nextflow_chat_template


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import conversion_memory  # noqa: E402
import qwen_parity  # noqa: E402
from random_qwen import CHAT_TEMPLATE, qwen_tokenizer, save_qwen, small_config  # noqa: E402


TEXTS = ["how many circles are there? one", "a red"]
# tied, spare rows of the vocabulary, bytes of a shard
SOURCES = {
    "untied, one file": (False, 8, "5GB"),
    "tied, one file": (True, 8, "5GB"),
    "untied, sharded": (False, 8, "20KB"),
    "tied, sharded": (True, 8, "20KB"),
    "untied, no spare rows": (False, 0, "5GB"),
    "tied, no spare rows": (True, 0, "20KB"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a Qwen2.5-VL and of what it is converted to, and the Qwen2.5-VL itself, by name."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("qwen")
            tied, spare_rows, max_shard_size = SOURCES[name]
            qwen = save_qwen(folder / "qwen", tied, spare_rows, max_shard_size)
            convert_qwen2_5_vl(
                folder / "qwen", folder / "nextflow", vq_config=tiny_vq_config(), max_shard_size=max_shard_size
            )
            made[name] = folder / "qwen", folder / "nextflow", qwen
        return made[name]

    return make


@pytest.fixture
def damaged(sources, tmp_path):
    """A copy of a sharded source, to be damaged."""
    return shutil.copytree(sources("untied, sharded")[0], tmp_path / "qwen")


def tensors_of(folder):
    return dict(ShardedCheckpoint(folder))


def assert_equal_tensors(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_text_logits_and_generated_text_are_those_of_qwen(sources, name):
    _, folder, qwen = sources(name)
    model = NextFlowForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        expected = qwen(**inputs).logits
        assert torch.equal(model(**inputs).logits[..., : expected.shape[-1]], expected)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = qwen.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("name", SOURCES)
def test_the_way_back_gives_the_tensors_and_the_config_of_the_source(sources, name, tmp_path):
    source, folder, _ = sources(name)
    export_qwen2_5_vl(folder, source, tmp_path / "back", max_shard_size="30KB")
    assert_equal_tensors(tensors_of(tmp_path / "back"), tensors_of(source))
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_text() == (source / file).read_text()


def test_new_tokens_take_spare_rows_and_what_the_source_has_is_not_changed(sources):
    source, folder, _ = sources("untied, sharded")
    config = NextFlowForConditionalGeneration.from_pretrained(folder).config
    count = len(qwen_tokenizer())
    assert (config.boi_token_id, config.eoi_token_id, config.text_config.vocab_size) == (count, count + 1, count + 8)
    head = tensors_of(source)["lm_head.weight"]
    assert torch.equal(tensors_of(folder)["lm_head.weight"], head)


def test_rows_that_are_new_start_from_the_mean_row(sources):
    source, folder, _ = sources("untied, no spare rows")
    before, after = tensors_of(source), tensors_of(folder)
    embeddings, mean = after["model.language_model.embed_tokens.weight"], before["model.embed_tokens.weight"].mean(0)
    assert len(embeddings) == len(before["model.embed_tokens.weight"]) + 2
    torch.testing.assert_close(embeddings[-2:], mean.expand(2, -1))
    mean = before["lm_head.weight"].mean(0)
    torch.testing.assert_close(after["visual_head.weight"], mean.expand(32, -1))


def test_code_rows_start_from_the_codebook_of_a_given_vision_tokenizer(sources, tmp_path):
    source, _, _ = sources("tied, one file")
    torch.manual_seed(1)
    vq_model = NextFlowVQModel(tiny_vq_config(codebook_size=16))
    vq_model.save_pretrained(tmp_path / "tokenizer")
    convert_qwen2_5_vl(source, tmp_path / "nextflow", vision_tokenizer=tmp_path / "tokenizer")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "nextflow")
    assert torch.equal(model.model.visual_embedding.codes.weight, vq_model.quantizer.codebook)
    assert_equal_tensors(model.vq_model.state_dict(), vq_model.state_dict())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_bfloat16_source_stays_bfloat16_and_its_tokenizer_float32(tmp_path):
    qwen = save_qwen(tmp_path / "qwen")
    qwen.bfloat16().save_pretrained(tmp_path / "qwen")
    convert_qwen2_5_vl(tmp_path / "qwen", tmp_path / "nextflow", vq_config=tiny_vq_config())
    for key, tensor in ShardedCheckpoint(tmp_path / "nextflow").layout.items():
        assert tensor.dtype == (torch.float32 if key.startswith("model.vq_model.") else torch.bfloat16), key


def test_the_chat_template_renders_text_as_before_and_marks_the_answers(sources):
    source, folder, _ = sources("untied, one file")
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": "a red circle"}, {"role": "assistant", "content": "one"}]
    for chat, prompt in ((turns[:1], True), (turns, False)):
        expected = qwen_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == expected
    encoded = processor.tokenizer.apply_chat_template(
        turns,
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    answer = [token for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"]) if marked]
    assert processor.tokenizer.decode(answer) == "one<|im_end|>"
    image = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    assert "vision" not in processor.apply_chat_template(image, tokenize=False)


def test_a_chat_template_of_another_form_is_kept():
    assert nextflow_chat_template("{{ messages[0].content }}") == "{{ messages[0].content }}"
    assert nextflow_chat_template(None) is None
    assert nextflow_chat_template(CHAT_TEMPLATE) != CHAT_TEMPLATE


def test_the_model_card_has_the_licence_and_the_name_of_the_source(sources):
    head = (sources("untied, one file")[1] / "README.md").read_text().split("---\n")[1]
    for line in ("license: other", "license_name: research", "pipeline_tag: any-to-any", "widget:"):
        assert line in head
    # A folder on the disk has no name on the Hub.
    assert "base_model" not in head


@pytest.mark.parametrize("place", ["jinja", "json", "tokenizer"])
def test_the_chat_template_is_found_where_processors_write_it(sources, tmp_path, place):
    source = shutil.copytree(sources("untied, one file")[0], tmp_path / "qwen")
    (source / "chat_template.jinja").unlink()
    other = CHAT_TEMPLATE.replace("how many", "two blue squares")
    if place == "json":
        (source / "chat_template.json").write_text(json.dumps({"chat_template": other}))
    elif place == "jinja":
        (source / "chat_template.jinja").write_text(other)
    else:
        settings = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": other}))
    convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())
    template = AutoProcessor.from_pretrained(tmp_path / "nextflow").chat_template
    assert template == nextflow_chat_template(other)


def test_a_template_that_marks_no_answers_is_told(sources, tmp_path):
    source = shutil.copytree(sources("untied, one file")[0], tmp_path / "qwen")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}")
    with pytest.warns(UserWarning, match="marks no answers"):
        convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())


@torch.no_grad()
def test_where_the_vocabulary_grows_logits_are_equal_up_to_rounding(tmp_path):
    # A product with two rows more may be computed in another order: with 342 rows torch does so.
    qwen = save_qwen(tmp_path / "qwen", tied=True, spare_rows=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    tokenizer.add_tokens([f"filler {index}" for index in range(342 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "qwen")
    qwen.resize_token_embeddings(342)
    qwen.save_pretrained(tmp_path / "qwen")
    convert_qwen2_5_vl(tmp_path / "qwen", tmp_path / "nextflow", vq_config=tiny_vq_config())
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "nextflow")
    assert model.config.text_config.vocab_size == 344
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        torch.testing.assert_close(model(**inputs).logits[..., :342], qwen(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_saved_beside_the_embeddings_that_it_is_tied_to(sources, tmp_path, equal):
    source = shutil.copytree(sources("tied, one file")[0], tmp_path / "qwen")
    state = load_file(source / SINGLE)
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head if equal else head + 1}, source / SINGLE)
    if equal:
        convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())
        assert_equal_tensors(tensors_of(tmp_path / "nextflow"), tensors_of(sources("tied, one file")[1]))
    else:
        with pytest.raises(ValueError, match="differs from the embeddings.*tie_word_embeddings to false"):
            convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())


def test_pickled_weights_are_read_as_well(sources, tmp_path):
    source = shutil.copytree(sources("untied, one file")[0], tmp_path / "qwen")
    torch.save(load_file(source / SINGLE), source / "pytorch_model.bin")
    (source / SINGLE).unlink()
    convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())
    assert_equal_tensors(tensors_of(tmp_path / "nextflow"), tensors_of(sources("untied, one file")[1]))


@pytest.mark.parametrize("narrow", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_model_of_mixed_types_is_loaded_in_the_widest(sources, tmp_path, narrow):
    source = shutil.copytree(sources("untied, one file")[0], tmp_path / "qwen")
    state = load_file(source / SINGLE)
    state[narrow] = state[narrow].half()
    save_file(state, source / SINGLE)
    convert_qwen2_5_vl(source, tmp_path / "nextflow", vq_config=tiny_vq_config())
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "nextflow")
    assert tensors_of(tmp_path / "nextflow")[narrow.replace("model.", "model.language_model.")].dtype == torch.float16
    own, name = model.model.language_model.layers[0].mlp.up_proj.weight, "model.layers.0.mlp.up_proj.weight"
    assert own.dtype == torch.float32 and torch.equal(own, state[name])


# --- Damaged files ------------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    """Rewrite the shard that holds the final norm, and the index with it."""
    index = json.loads((folder / INDEX).read_text())
    name = index["weight_map"]["model.norm.weight"]
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)
    kept = {key: file for key, file in index["weight_map"].items() if file != name}
    (folder / INDEX).write_text(json.dumps({"weight_map": kept | dict.fromkeys(state, name)}))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder):
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    path.write_bytes(path.read_bytes()[:-1])


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = values.pop("dtype", config["dtype"])
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def change_tokenizer(folder, more):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(more)
    tokenizer.save_pretrained(folder)


NORM = "model.norm.weight"
ROWS = len(qwen_tokenizer()) + 8
DAMAGE = {
    "missing tensor": (lambda folder: change_tensors(folder, lambda state: state.pop(NORM)), "missing: .*norm.weight"),
    "extra tensor": (
        lambda folder: change_tensors(folder, lambda state: state.update({"model.layers.7.x": torch.ones(1)})),
        r"not expected: .*layers.7.x",
    ),
    "unknown tensor": (
        lambda folder: change_tensors(
            folder, lambda state: state.update({"adapter": torch.ones(1), "adapter.more": torch.ones(1)})
        ),
        "no rows for adapter, adapter.more",
    ),
    "misshapen tensor": (
        lambda folder: change_tensors(folder, lambda state: state.update({NORM: torch.ones(31)})),
        r"norm.weight \(31,\) instead of \(32,\)",
    ),
    "nan": (
        lambda folder: change_tensors(folder, lambda state: state[NORM].fill_(float("nan"))),
        "'model.norm.weight' holds NaN",
    ),
    "infinity": (
        lambda folder: change_tensors(folder, lambda state: state[NORM][3:4].fill_(float("-inf"))),
        "'model.norm.weight' holds NaN or infinite",
    ),
    "truncated shard": (truncate, "cannot be read; is it complete"),
    "index without a tensor": (
        lambda folder: change_index(folder, lambda files: files.pop(NORM)),
        "disagree on .*norm",
    ),
    "index with a tensor that is not there": (
        lambda folder: change_index(folder, lambda files: files.update(more=files[NORM])),
        "disagree on more",
    ),
    "index with a file that is not there": (
        lambda folder: change_index(folder, lambda files: files.update({NORM: "other.safetensors"})),
        "names other.safetensors, but there is no such file",
    ),
    "index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} is not valid JSON"),
    "no weights": (lambda folder: (folder / INDEX).unlink(), f"neither {SINGLE} nor {INDEX}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "There is no file .*config.json"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
    "config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not valid JSON",
    ),
    "unknown activation": (lambda folder: change_config(folder, hidden_act="foo"), "does not describe its model.*foo"),
    "negative layers": (lambda folder: change_config(folder, num_hidden_layers=-1), "does not describe its model"),
    "rotary sections that do not fit": (
        lambda folder: change_config(
            folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1]}
        ),
        "does not describe its model.*has 3 frequencies",
    ),
    "words for numbers": (lambda folder: change_config(folder, vocab_size="many"), "does not describe its model"),
    "unknown dtype": (lambda folder: change_config(folder, dtype="float99"), "does not describe its model.*float99"),
    "vocabulary that is larger than the file's": (
        lambda folder: change_config(folder, vocab_size=ROWS + 50),
        rf"embed_tokens.weight \({ROWS}, 32\) instead of \({ROWS + 50}, 32\)",
    ),
    "vocabulary that is smaller than the file's": (
        lambda folder: change_config(folder, vocab_size=ROWS - 2),
        rf"embed_tokens.weight \({ROWS}, 32\) instead of \({ROWS - 2}, 32\)",
    ),
    "tokenizer that is longer than the vocabulary": (
        lambda folder: change_tokenizer(folder, [f"filler {index}" for index in range(20)]),
        f"has {ROWS - 8 + 20} tokens, its config a vocabulary of {ROWS}",
    ),
    "float8": (
        lambda folder: change_tensors(folder, lambda state: state.update({NORM: state[NORM].to(torch.float8_e4m3fn)})),
        "is of torch.float8_e4m3fn; save it as one of",
    ),
    "card of broken YAML": (
        lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
        "head of .*README.md",
    ),
    "card in another encoding": (lambda folder: (folder / "README.md").write_bytes(b"\xe9"), "head of .*README.md"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read; is it complete"),
    "half a slow tokenizer": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
        "holds no tokenizer",
    ),
    "chat template that is none": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ bad"),
        "chat template of .* cannot be rendered",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_source_is_refused_and_nothing_is_written(damaged, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(damaged)
    with pytest.raises(ValueError, match=message):
        convert_qwen2_5_vl(damaged, tmp_path / "out", vq_config=tiny_vq_config())
    assert [path.name for path in tmp_path.iterdir()] == ["qwen"]


def test_a_size_of_shards_that_is_none_is_refused(sources, tmp_path):
    for size in ("abc", "0", "0GB", "2GiB", ""):
        with pytest.raises(ValueError, match="max_shard_size must be a size such as '2GB'"):
            convert_qwen2_5_vl(
                sources("tied, one file")[0], tmp_path / "out", vq_config=tiny_vq_config(), max_shard_size=size
            )
        assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_overwritten(sources, tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        convert_qwen2_5_vl(sources("tied, one file")[0], tmp_path, vq_config=tiny_vq_config())
    assert not list(tmp_path.iterdir())


def test_a_nextflow_of_another_size_is_not_exported(sources, tmp_path):
    save_qwen(tmp_path / "larger", intermediate_size=96)
    with pytest.raises(ValueError, match="of another shape: .*mlp"):
        export_qwen2_5_vl(sources("untied, one file")[1], tmp_path / "larger", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# --- Interruptions ------------------------------------------------------------------------------------------------


def test_a_killed_conversion_goes_on_with_the_shards_that_are_finished(sources, tmp_path, monkeypatch):
    source, whole, _ = sources("untied, sharded")
    settings = {"vq_config": tiny_vq_config(), "max_shard_size": "20KB"}
    write = conversion_qwen2_5_vl.write_shards

    def killed(folder, layout, make, max_shard_size):
        def make_some(key):
            if "layers.1.mlp.up" in key:
                raise KeyboardInterrupt
            return make(key)

        write(folder, layout, make_some, max_shard_size)

    monkeypatch.setattr(conversion_qwen2_5_vl, "write_shards", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_qwen2_5_vl(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert finished

    monkeypatch.setattr(conversion_qwen2_5_vl, "write_shards", write)
    with pytest.raises(ValueError, match="started from other files or with other settings"):
        convert_qwen2_5_vl(source, tmp_path / "out", **settings, seed=1)
    convert_qwen2_5_vl(source, tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert_equal_tensors(tensors_of(tmp_path / "out"), tensors_of(whole))


# --- Benchmarks ---------------------------------------------------------------------------------------------------


def test_the_parity_that_is_stored_is_of_logits_texts_and_the_way_back(tmp_path):
    figures = qwen_parity.figures_of(tmp_path, tied=True, spare_rows=8, max_shard_size="20KB")
    assert figures == {"max_abs_error": 0.0, "logits_equal": True, "texts_equal": True, "round_trip_equal": True}


def test_the_stand_in_of_the_memory_benchmark_is_a_whole_source_that_takes_no_disk(tmp_path):
    config = small_config()
    conversion_memory.write_stand_in(tmp_path, config, max_shard_size="20KB")
    checkpoint = ShardedCheckpoint(tmp_path)
    assert {"lm_head.weight", "visual.merger.ln_q.weight"} < checkpoint.keys()
    assert all(not tensor.any() and tensor.dtype == torch.bfloat16 for tensor in checkpoint.values())
    large = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert large.stat().st_blocks * 512 < large.stat().st_size
