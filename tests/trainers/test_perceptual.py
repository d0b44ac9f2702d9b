"""The perceptual distance from weights at hand, and tokenizer recipes that are judged by it and a discriminator."""

import os

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_data_format import image, write_lines
from test_recipes import FOLDER
from test_trainer import Killed, conversation, text
from test_vq_trainer import make_images, tiny_vq_model
from transformers import TrainerCallback

from transformers_nextflow.evaluation.image_metrics import to_uint8
from transformers_nextflow.trainers import load_perceptual
from transformers_nextflow.trainers.recipe_trainers import make_trainer
from transformers_nextflow.trainers.recipes import Recipe, load_recipe, run_recipe


NUMBERS = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
WIDTHS = (2, 3, 4, 5, 6)
RECIPE = {
    "stage": "joint", "semantic_weight": 0.0, "autoencoder_share": 0.34, "max_steps": 6, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "perceptual_weight": 0.5, "adversarial_weight": 0.1, "adversarial_start": 0.0,
    "save_steps": 3, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "kmeans_images": 4,
    "revive_every": 2,
}  # fmt: skip


def weights(seed: int = 0) -> tuple[dict, dict]:
    """A narrow VGG16 by torchvision's names, and how much its channels count by those of lpips."""
    generator, network, weighing, before = torch.Generator().manual_seed(seed), {}, {}, 3
    for block, (numbers, width) in enumerate(zip(NUMBERS, WIDTHS)):
        for number in numbers:
            network[f"features.{number}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / 3
            network[f"features.{number}.bias"] = torch.randn(width, generator=generator) / 3
            before = width
        weighing[f"lin{block}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return network, weighing


def of_the_package(network: dict, weighing: dict) -> dict:
    """The same as one state dict of the package lpips, with what it holds besides."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, value in network.items():
        _, number, kind = name.split(".")
        block = next(index for index, numbers in enumerate(NUMBERS) if int(number) in numbers)
        state[f"net.slice{block + 1}.{number}.{kind}"] = value
    return state | weighing | {f"lins.{name[3:]}": value for name, value in weighing.items()}


def reference(network: dict, weighing: dict, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """LPIPS as its paper writes it: at each layer, at each place, unit vectors, their weighed squared difference."""
    maps, distance = [], 0.0
    for one in (image, other):
        channels = [(-0.030, 0.458), (-0.088, 0.448), (-0.188, 0.450)]
        maps.append(torch.stack([(one[:, c] - shift) / scale for c, (shift, scale) in enumerate(channels)], 1))
    for block, numbers in enumerate(NUMBERS):
        if block:
            maps = [F.max_pool2d(one, 2) for one in maps]
        for number in numbers:
            own = network[f"features.{number}.weight"], network[f"features.{number}.bias"]
            maps = [F.conv2d(one, *own, padding=1).relu() for one in maps]
        units = [one / one.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for one in maps]
        squares = (units[0] - units[1]).square() * weighing[f"lin{block}.model.1.weight"]
        distance = distance + squares.sum(1).flatten(1).mean(1)
    return distance


@pytest.mark.parametrize("layout", ["a file", "a folder", "the package's state dict"])
def test_the_distance_is_that_of_its_paper_from_every_layout_of_the_weights(layout, tmp_path):
    network, weighing = weights()
    path = tmp_path / "lpips"
    if layout == "a folder":
        path.mkdir()
        torch.save(network | {"classifier.0.weight": torch.zeros(2, 2)}, path / "vgg16-397923af.pth")
        save_file(weighing, path / "vgg.safetensors")
    elif layout == "a file":
        path = tmp_path / "lpips.safetensors"
        save_file(network | weighing, path)
    else:
        path = tmp_path / "lpips.pt"
        torch.save(of_the_package(network, weighing), path)
    distance = load_perceptual(path)
    images, others = make_images(3), make_images(3, seed=1).requires_grad_()
    found = distance(images, others)
    torch.testing.assert_close(found, reference(network, weighing, images, others), atol=1e-5, rtol=1e-4)
    assert torch.equal(distance(images, images), torch.zeros(3)) and (found > 0).all()
    found.sum().backward()
    assert (
        others.grad.isfinite().all() and others.grad.any() and not any(p.requires_grad for p in distance.parameters())
    )
    assert not distance.training


class Code:
    def __reduce__(self):
        return os.getcwd, ()


def test_weights_that_make_no_distance_are_refused_by_name(tmp_path):
    network, weighing = weights()
    wide = {"features.5.weight": torch.zeros(3, 7, 3, 3)}
    wrong = {
        "lin0.model.1.weight is missing": network,
        "features.0.weight is missing": weighing,
        "features.5.weight has the shape": network | weighing | wide,
        "features.7.bias is not a tensor of finite floats": network
        | weighing
        | {"features.7.bias": torch.full((3,), torch.nan)},
        "is not a pickle of only tensors": {"features.0.weight": Code()},
    }
    for number, (message, state) in enumerate(wrong.items()):
        torch.save(state, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match=message):
            load_perceptual(tmp_path / f"{number}.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no weights"):
        load_perceptual(tmp_path / "empty")
    with pytest.raises(ValueError, match="There is no file"):
        load_perceptual(tmp_path / "none.pt")
    save_file(network | weighing, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="Images of 8x8 pixels are too small: sides start at 16"):
        load_perceptual(tmp_path / "whole.safetensors")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def data(tmp_path):
    rows = []
    for number, pixels in enumerate(make_images(4)):
        Image.fromarray(to_uint8(pixels[None])[0]).save(tmp_path / f"{number}.png")
        rows.append({"messages": conversation([text("")], [image(f"{number}.png")])})
    write_lines(tmp_path / "rows.jsonl", rows)
    tiny_vq_model().save_pretrained(tmp_path / "start")
    save_file(weights()[0] | weights()[1], tmp_path / "lpips.safetensors")
    return tmp_path


def recipe_of(folder, **changes) -> Recipe:
    fields = {"perceptual": str(folder / "lpips.safetensors"), "discriminator": {"channels": 4, "layers": 1}}
    fields |= {name: changes.pop(name) for name in tuple(changes) if name in ("perceptual", "discriminator", "kind")}
    return Recipe(fields.pop("kind", "tokenizer"), RECIPE | changes, level=16, **fields)


def test_a_recipe_trains_with_both_judges_and_goes_on_exactly_after_a_kill(data):
    class KilledAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    def trained(output, resume=False, killed=False):
        trainer = make_trainer(recipe_of(data), data / "start", data / "rows.jsonl", data / output)
        if killed:
            trainer.add_callback(KilledAt())
            with pytest.raises(Killed):
                trainer.train()
            return trainer
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = trained("whole")
    assert {"perceptual_loss", "adversarial_loss", "discriminator_loss"} <= set(whole.state.log_history[0])
    trained("broken", killed=True)
    resumed = trained("broken", resume=True)
    for one, other in ((whole.model, resumed.model), (whole.adversary.discriminator, resumed.adversary.discriminator)):
        states = one.state_dict(), other.state_dict()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    optimizers = [trainer.adversary.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert all(torch.equal(optimizers[0][n]["exp_avg_sq"], optimizers[1][n]["exp_avg_sq"]) for n in optimizers[0])
    with pytest.raises(ValueError, match=r"discriminator\.layers\.0\.weight was \[4, .* and is \[8, "):
        other = recipe_of(data, discriminator={"channels": 8, "layers": 1})
        make_trainer(other, data / "start", data / "rows.jsonl", data / "broken").train(
            resume_from_checkpoint=str(data / "broken" / "checkpoint-3")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual": None}, "perceptual_weight 0.5 needs a network: set perceptual to the file or folder"),
        (
            {"perceptual_weight": 0.0},
            "perceptual .*lpips.safetensors has no effect: set perceptual_weight above 0",
        ),
        ({"adversarial_weight": 0.0}, "discriminator .* has no effect: set adversarial_weight above 0"),
        ({"discriminator": {"layer": 1}}, "layer"),
        ({"discriminator": {"layers": 0}}, "channels and layers must be at least 1"),
        ({"discriminator": {}}, "Images have sides of 16 pixels, and discriminator needs at least 24; set"),
        ({"perceptual": "none.pt"}, "There is no file none.pt"),
    ],
)
def test_judges_that_do_not_fit_a_recipe_are_refused_before_it_begins(changes, message, data):
    with pytest.raises(ValueError, match=message):
        make_trainer(recipe_of(data, **changes), data / "start", data / "rows.jsonl", data / "out")


def test_judges_are_of_the_tokenizer_and_are_read_from_a_file(data):
    with pytest.raises(ValueError, match="is of the kind tokenizer"):
        Recipe("transformer", {}, perceptual="lpips")
    with pytest.raises(ValueError, match="discriminator must be names with values"):
        load_recipe(FOLDER / "tokenizer_decoder.yaml", ["discriminator=4"])
    changes = [
        f"perceptual={data}/lpips.safetensors",
        "perceptual_weight=1.0",
        "use_cpu=true",
        "max_steps=1",
        "level=16",
    ]
    changes += ["adversarial_weight=0.1", "discriminator={layers: 1}", "adversarial_start=0.0", "report_to=none"]
    run_recipe(load_recipe("tokenizer_decoder", changes), data / "start", data / "rows.jsonl", data / "out")
    assert (data / "out" / "final" / "model.safetensors").is_file()
