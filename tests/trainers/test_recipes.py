"""Recipes: what the files say, what a stage trains, how stages follow each other, and a sharded step."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from command_line import run_command
from PIL import Image
from processes import in_two_processes
from test_trainer import Killed, codes, conversation, drawing, question, text, training_arguments
from tiny import free_port, tiny_model, tiny_processor, tiny_vq_config

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.data import BadRowError, extract_codes, open_rows
from transformers_nextflow.data.views import as_caption, without_prompt
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer
from transformers_nextflow.trainers.packing import CostModel
from transformers_nextflow.trainers.recipe_data import StageImages, StageRows
from transformers_nextflow.trainers.recipe_trainers import make_trainer as trainer_of
from transformers_nextflow.trainers.recipes import RECIPES, load_recipe, recipe_names, run_recipe


FOLDER = RECIPES
# Paper, table 2.
RATES = {"alignment": 1e-3, "pretrain_256": 1e-4, "pretrain_512": 1e-4, "pretrain_1024": 1e-4}
RATES |= {"continued": 5e-5, "sft": 1e-5}
SMALL = ["max_steps=1", "bf16=false", "use_cpu=true", "report_to=[]", "disable_tqdm=true", "warmup_steps=0"]
SMALL += ["level=16", "per_device_train_batch_size=2", "packing=padding", "packing_budget=null"]
SHARDING = yaml.safe_load((FOLDER / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
SMALL_VQ = [change for change in SMALL if not change.startswith(("packing", "bf16"))]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def start(tmp_path) -> Path:
    """A model with its processor, as a stage finds it."""
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def changed(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
    """Which parts of the model differ."""
    other = after.state_dict()
    names = [name for name, value in before.state_dict().items() if not torch.equal(value, other[name])]
    return {name.removeprefix("model.").removeprefix("language_model.").split(".")[0] for name in names}


def test_the_files_say_what_the_paper_does():
    files = {path.stem for path in FOLDER.glob("*.yaml")}
    of_small_machines = {"tokenizer", "transformer", "lora", "rl"}
    of_tokenizers = {"tokenizer_pixel", "tokenizer_joint", "tokenizer_decoder"}
    of_decoders = {"diffusion_decoder", "diffusion_decoder_large"}
    assert files == {*RATES} | of_tokenizers | of_decoders | of_small_machines
    for name, rate in RATES.items():
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        assert recipe.arguments["learning_rate"] == rate and recipe.empty_share == 0.1
        assert (set(recipe.train) == {"visual_embedding", "heads"}) == (name == "alignment")
        assert recipe.level == {"alignment": 256}.get(name, int(name.rpartition("_")[2]) if "_" in name else None)
    for stage in ("pixel", "joint", "decoder"):
        recipe = load_recipe(FOLDER / f"tokenizer_{stage}.yaml")
        assert (recipe.kind, recipe.arguments["stage"]) == ("tokenizer", stage)
        assert recipe.decoder_width == (2 if stage == "decoder" else 1)


def test_stages_follow_each_other_and_train_their_parts_alone(start, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [drawing("a red circle", 1), question("how many?", "one", 2)])
    folders = [start]
    for name in ("alignment", "pretrain_256"):
        command = ["train", FOLDER / f"{name}.yaml", "--model", folders[-1], "--data", data]
        command += ["--output", tmp_path / name, *(part for change in SMALL for part in ("--set", change))]
        result = run_command(*command)
        assert result.exit_code == 0, result.output
        folders.append(tmp_path / name / "final")
    models = [NextFlowForConditionalGeneration.from_pretrained(folder) for folder in folders]
    assert changed(*models[:2]) == {"visual_embedding", "lm_head", "visual_head"}
    everything = {"visual_embedding", "lm_head", "visual_head", "embed_tokens", "layers", "norm"}
    assert changed(*models[1:]) == everything


def test_the_stages_of_the_tokenizer_train_their_parts_and_the_last_widens_the_decoder(tmp_path):
    torch.manual_seed(0)
    NextFlowVQModel(tiny_vq_config(semantic_target_dim=16)).save_pretrained(tmp_path / "start")
    rows = []
    for number in range(2):
        pixels = torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(number))
        Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / f"{number}.png")
        row = drawing("a red circle", number) | {"image_tokens": None, "image_grids": None}
        row["messages"][1]["content"][0]["image"] = f"{number}.png"
        rows.append(row)
    data, folders = write_rows(tmp_path / "rows.jsonl", rows), [tmp_path / "start"]
    for stage in ("pixel", "joint", "decoder"):
        changes = SMALL_VQ + (["autoencoder_share=1.0"] if stage == "joint" else [])
        recipe = load_recipe(FOLDER / f"tokenizer_{stage}.yaml", changes)
        run_recipe(recipe, folders[-1], data, tmp_path / stage)
        folders.append(tmp_path / stage / "final")
    models = [NextFlowVQModel.from_pretrained(folder) for folder in folders]
    assert changed(*models[:2]) == {"pixel_encoder", "pixel_decoder"}
    assert {"semantic_encoder", "semantic_decoder", "pixel_encoder"} <= changed(*models[1:3])
    assert models[3].config.pixel_decoder_channels == 2 * models[2].config.pixel_decoder_channels
    kept = {name: value for name, value in models[2].state_dict().items() if not name.startswith("pixel_decoder.")}
    assert all(torch.equal(value, models[3].state_dict()[name]) for name, value in kept.items())
    # The seed decides about the weights from which the new decoder starts.
    recipes = [load_recipe(FOLDER / "tokenizer_decoder.yaml", [*SMALL_VQ, f"seed={seed}"]) for seed in (1, 1, 2)]
    starts = [trainer_of(recipe, folders[-2], data, tmp_path / "again").model.pixel_decoder for recipe in recipes]
    first, same, other = (torch.nn.utils.parameters_to_vector(start.parameters()) for start in starts)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_some_steps_are_measured_where_asked_for(start, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [drawing("one", 1), question("two", "one", 2)] * 4)
    recipe = load_recipe("pretrain_256", [*SMALL, "max_steps=7"])
    run_recipe(recipe, start, data, tmp_path / "out", profile=True)
    assert "aten::mm" in (tmp_path / "out" / "profile" / "operations.txt").read_text()
    trace = json.loads((tmp_path / "out" / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#5"} <= names and "ProfilerStep#6" not in names


def test_a_drawing_turned_round_is_a_caption_of_the_uncorrected_image():
    row = drawing("a red circle", 1) | {"image_labels": [codes(2)], "image_clean_tokens": [codes(3)]}
    turned = as_caption(row, "describe the picture.")
    roles = [[part.get("text", "image") for part in message["content"]] for message in turned["messages"]]
    assert roles == [["image", "describe the picture."], ["a red circle"]]
    assert turned["image_tokens"] == [codes(3)] and row["image_tokens"] == [codes(1)]
    batch = NextFlowCollator(tiny_processor())([turned])
    assert batch["image_tokens"].tolist() == batch["image_labels"].tolist() == [codes(3)]
    assert as_caption(drawing("one", 1), "what?")["image_tokens"] == [codes(1)]
    # Labels are nearest to what the sampled codes left over: they are no codes of the image.
    with pytest.raises(BadRowError, match=r"image_tokens\[0\]: differ from image_labels, .* extract the codes again"):
        as_caption(row | {"image_clean_tokens": None}, "describe the picture.")
    for other in (question("how many?", "one", 2), drawing("", 1)):
        assert as_caption(other, "describe the picture.") is other


def test_the_asked_share_of_drawings_is_turned_round_always_the_same_ones():
    rows = [drawing("a red circle", 1)] * 1000

    def turned(seed: int) -> list[bool]:
        stage = StageRows(rows, tiny_processor(), caption_share=0.1, seed=seed)
        return [len(stage[i]["messages"][0]["content"]) == 2 for i in range(len(stage))]

    assert 70 < sum(turned(0)) < 130
    assert turned(0) == turned(0) != turned(1)


def test_drawings_whose_codes_were_extracted_are_turned_round_and_emptied_too(start, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "red.png")
    row = {"messages": conversation([text("a red circle")], [{"type": "image", "image": "red.png"}])}
    extract_codes(write_rows(tmp_path / "rows.jsonl", [row]), start, tmp_path / "codes")
    rows, _ = open_rows(tmp_path / "codes")
    turned = StageRows(rows, tiny_processor(), caption_share=1.0)[0]
    assert [part["type"] for part in turned["messages"][0]["content"]] == ["image", "text"]
    assert turned["messages"][1]["content"][0]["text"] == "a red circle"
    emptied = StageRows(rows, tiny_processor(), empty_share=1.0)[0]
    assert [part["text"] for part in emptied["messages"][0]["content"]] == [""]
    batch = NextFlowCollator(tiny_processor())([turned, emptied])
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    own = tiny_model().vq_model.encode(images).image_tokens[0].tolist()
    assert batch["image_tokens"].tolist() == [own, *rows[0]["image_tokens"]]
    assert rows[0]["image_tokens"] != [own] != rows[0]["image_labels"]


def test_prompts_that_are_answered_by_a_image_alone_are_left_empty():
    assert without_prompt(drawing("a red circle", 1)) == drawing("", 1)
    edit = {"messages": conversation([{"type": "image"}, text("make it blue")], [{"type": "image"}])}
    assert without_prompt(edit)["messages"] == conversation([{"type": "image"}, text("")], [{"type": "image"}])
    story = {"messages": conversation([text("one")], [{"type": "image"}, text("two")])}
    flagged = {"messages": conversation([text("one") | {"train": True}], [{"type": "image"}])}
    for other in (question("how many?", "one", 2), story, flagged):
        assert without_prompt(other) is other


def test_the_two_shares_take_different_rows():
    rows = [drawing("a red circle", 1)] * 1000
    stage = StageRows(rows, tiny_processor(), caption_share=0.1, empty_share=0.2)
    first = [stage[i]["messages"][0]["content"][0] for i in range(len(stage))]
    captions, empty = (first.count(part) for part in ({"type": "image"}, text("")))
    assert 70 < captions < 130 and 160 < empty < 240


def test_each_epoch_takes_other_rows_for_the_shares_and_a_training_that_goes_on_does_too(start, tmp_path):
    rows = [drawing(caption, number) for number, caption in enumerate(["a", "b", "c", "d"])]
    stage = StageRows(rows, tiny_processor(), empty_share=0.5)
    seen = set()
    for epoch in range(12):
        stage.set_epoch(epoch)
        seen |= {row["messages"][0]["content"][0]["text"] for row in (stage[index] for index in range(4))}
    assert seen == {"", "a", "b", "c", "d"}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = [*SMALL, "max_steps=7", "save_steps=3", "empty_share=0.5", "learning_rate=1e-2", "save_total_limit=null"]
    recipe = load_recipe("pretrain_256", changes)
    trainer = trainer_of(recipe, start, data, tmp_path / "out")
    told, rows_of_epoch = [], trainer.train_dataset.rows
    set_epoch = rows_of_epoch.set_epoch
    rows_of_epoch.set_epoch = lambda epoch: told.append(epoch) or set_epoch(epoch)
    trainer.train()
    assert list(dict.fromkeys(told)) == [0, 1, 2, 3]
    again = trainer_of(recipe, start, data, tmp_path / "out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))  # in the middle of the second epoch
    own = trainer.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.model.state_dict().items())


@pytest.mark.parametrize("packing", ["length", "compute"])
def test_packs_take_other_rows_in_each_epoch_too_and_never_exceed_their_budget(packing, tmp_path):
    captions = ["a red circle", "two blue squares and a green star", "how many circles are there? one", "one"]
    rows = StageRows([drawing(caption, n) for n, caption in enumerate(captions)], tiny_processor(), None, 0.3, 0.3)
    args = training_arguments(tmp_path, [1], packing=packing, packing_budget=150)
    trainer = NextFlowTrainer(tiny_model(), args, train_dataset=rows, processing_class=tiny_processor())
    collator, model, told = trainer.data_collator, CostModel.from_config(trainer.model.config), []
    unchanged, packs = set(), trainer.train_dataset.packs
    for epoch in range(12):
        trainer.state.epoch = float(epoch)
        trainer.callback_handler.on_epoch_begin(args, trainer.state, trainer.control)
        told.append(rows.epoch)
        for pack in trainer.train_dataset:
            sizes = [collator.size(row) for row in pack]
            assert sum(s.length if packing == "length" else model.cost(s) for s in sizes) <= args.packing_budget
            unchanged |= {row["messages"][0]["content"][0].get("text") for row in pack}
    assert told == list(range(12)) and unchanged == {None, "", *captions}
    assert trainer.train_dataset.packs == packs and len(packs) > 1


def test_images_of_the_tokenizer_are_read_as_the_image_processor_reads_them(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / "grey.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[274] = 3  # turned by half a circle
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    names = ["grey.png", "clear.png", "turned.png"]
    rows = [{"messages": conversation([text("")], [{"type": "image", "image": name}])} for name in names]
    processor = tiny_processor().image_processor
    images = StageImages(rows, tmp_path, processor, level=16)
    for index, name in enumerate(names):
        expected = processor(str(tmp_path / name), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(images[index]["pixel_values"], expected)


def test_a_kill_while_the_outcome_is_written_leaves_the_one_before(start, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", [drawing("a red circle", 1)])
    recipe = load_recipe(FOLDER / "sft.yaml", [*SMALL, "save_strategy='no'"])
    run_recipe(recipe, start, data, tmp_path / "out")
    before = (tmp_path / "out" / "final" / "model.safetensors").read_bytes()

    def kill(self, folder):
        (Path(folder) / "model.safetensors").parent.mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(NextFlowTrainer, "save_model", kill)
        run_recipe(recipe, start, data, tmp_path / "out")
    assert (tmp_path / "out" / "final" / "model.safetensors").read_bytes() == before
    run_recipe(recipe, start, data, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"final"}


def test_codes_of_another_level_are_refused():
    processor = tiny_processor(levels=[[12, 3], [16, 4]])
    rows = [drawing("a red circle", 1), drawing("a red circle", 1) | {"image_grids": [[3, 3]]}]
    stage = StageRows(rows, processor, level=16)
    assert stage[0] is rows[0]
    with pytest.raises(ValueError, match="Row 1 .* 3x3 cells, which is none of level 16; extract its codes"):
        stage[1]


def test_changes_are_of_the_recipe_or_of_its_arguments():
    recipe = load_recipe(FOLDER / "sft.yaml", ["learning_rate=3e-4", "level=512", "train=[heads]", "optim=sgd"])
    assert (recipe.level, recipe.train) == (512, ("heads",))
    assert (recipe.arguments["learning_rate"], recipe.arguments["optim"]) == (3e-4, "sgd")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["learning_rat=1"], "has no .learning_rat.; did you mean learning_rate"),
        (["max_steps"], "name=value, got 'max_steps'"),
        (["train=[head]"], r"got \['head'\]"),
        (["caption_share=2"], r"must lie in \[0, 1\], with their sum, got 2 and 0.1"),
        (["empty_share=-1"], "got 0.0 and -1"),
        (["kind=decoder"], "kind must be one of"),
    ],
)
def test_a_misspelt_recipe_is_refused_by_the_name(changes, message, start, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(load_recipe(FOLDER / "sft.yaml", changes), start, tmp_path / "rows.jsonl", tmp_path / "out")
    (tmp_path / "wrong.yaml").write_text("kind: transformer\nlevle: 3\n")
    with pytest.raises(ValueError, match="has no .levle.; did you mean level"):
        load_recipe(tmp_path / "wrong.yaml")


def _two_drawings() -> dict[str, torch.Tensor]:
    # As many trained positions each, so that the mean of two processes is that of the batch.
    return NextFlowCollator(tiny_processor())([drawing("a red circle", seed) for seed in (1, 2)])


def _step(model: torch.nn.Module, batch: dict):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-3)
    model(**batch).loss.backward()
    optimizer.step()


def _sharded_step(rank: int, port: int, folder: str):
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh, model = torch.distributed.init_device_mesh("cpu", (2,)), tiny_model()
    for module in model.modules():
        if type(module).__name__ == SHARDING["fsdp_transformer_layer_cls_to_wrap"]:
            fully_shard(module, mesh=mesh, reshard_after_forward=SHARDING["fsdp_reshard_after_forward"])
    fully_shard(model, mesh=mesh)
    batch = _two_drawings()
    # Both rows hold one image.
    _step(model, {name: value[rank : rank + 1] for name, value in batch.items()})
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]
    weights = {name: model.get_parameter(name).full_tensor() for name in sharded}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    torch.distributed.destroy_process_group()


def test_a_sharded_step_of_two_processes_is_the_step_of_one(tmp_path):
    in_two_processes(_sharded_step, free_port(), str(tmp_path))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = tiny_model()
    _step(model, _two_drawings())
    # All but the tokenizer.
    assert weights.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not torch.equal(weights["lm_head.weight"], tiny_model().lm_head.weight)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)


def test_the_files_for_accelerate_are_what_it_reads():
    for path in FOLDER.glob("accelerate/*.yaml"):
        config = load_config_from_file(str(path))
        assert (config.num_processes, config.mixed_precision) == (8, "bf16")


def test_recipes_have_names_and_other_names_are_refused():
    assert load_recipe("sft") == load_recipe(RECIPES / "sft.yaml")
    with pytest.raises(ValueError, match="sftt is neither a file nor a recipe; there are alignment, continued"):
        load_recipe("sftt")
    assert recipe_names() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
