"""Assemble the bundled checkpoint from the outputs of the training scripts; write its model card from stored scores.

    python examples/shapes/make_checkpoint.py --model MODEL --processor PROCESSOR --tokenizer TOKENIZER SAMPLING
    transformers-nextflow evaluate checkpoints/nextflow-shapes --suite shapes --seeds 2 \
        --json benchmarks/results/shapes.json --sheets checkpoints/nextflow-shapes
    python examples/shapes/make_checkpoint.py --model MODEL --processor PROCESSOR --tokenizer TOKENIZER SAMPLING \
        --results benchmarks/results/shapes.json

`README.md` in the same folder has the folders and the sampling settings of the bundled checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoProcessor, GenerationConfig

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.worlds.shapes import World
from transformers_nextflow.worlds.shapes.statement import trained_on


MAX_BYTES = 25_000_000
DECODER = "pixel_decoder."
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")
EDITING_SAMPLING = ("guidance_scale", "image_guidance_scale", "temperature")
SHEET = "text_to_image.png"
WIDGET_PROMPT = "a red circle and a blue square"
# Example prompts, each with the sheet that shows such results: a drawing, an edit, a question about a video, a video.
WIDGETS = {
    WIDGET_PROMPT: SHEET,
    "make the red circle green": "editing.png",
    "what happens?": "video_question.png",
    "the red circle moves right": "video.png",
}
MODEL_NAME = "NextFlow on the shapes world"
SUITES = ("text_to_image", "held_out_combinations", "understanding", "tokenizer", "oracle")
RECIPE = Path(__file__).with_name("README.md")

INTRODUCTION = """\
# NextFlow on the shapes world

This is a small NextFlow ([arXiv 2601.02204](https://arxiv.org/abs/2601.02204)), one transformer that draws scale by
scale, edits, thinks before it draws, tells stories, draws videos and answers questions. It has {total:.1f} million
parameters, {vision:.1f} million of them in the vision tokenizer. It was trained from scratch, some hours on two CPU
cores and nine minutes on a GPU. It knows only the shapes world, coloured shapes on a plain background. Its purpose is
to run, test and study the code, not to draw photographs.

![one row of images for each category of prompts]({sheet})

## Use

```python
import torch
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("checkpoints/nextflow-shapes")
image = pipe("{prompt}", generator=torch.Generator().manual_seed(0)).images[0]
pipe("make the red circle green", image=image).images[0].save("image.png")
```

`docs/abilities.md` shows its other abilities.

The checkpoint's own sampling settings are {sampling}; for edits and videos they are {editing}.
"""
ORIGIN = """\
## Scores

The scores were computed with `{command}` at commit {commit}, on {device}.
"""
DRAWING_RULES = """\
**Drawing.** A score is the share of the images that hold what the prompt asked for, with exact counts (GenEval's rule).
Under the strict rule the images may hold nothing else. The prompts of `held out` have a pair of shape and colour that
the transformer never saw in training. `overall` is the mean of the categories.
"""
UNDERSTANDING_RULES = """\
**Understanding.** A score is the share of right answers. `questions` is the mean over the kinds of questions; `overall`
also includes captions. Scenes and questions are sampled as in the training, which may have had some of them.
"""
TOKENIZER_RULES = """\
**Tokenizer.** These scores say how well the vision tokenizer reconstructs held-out images with all pairs of shape and
colour. They are an upper bound of the scores above. `linear_probe` reads the codes of all scales but the last,
`with_last_scale` those of all scales.
"""
ORACLE_RULES = """\
**Oracle.** A score is the share of images with exactly the right objects, at any place, if the model is given the true
codes of the first scales.
"""
LAYOUT_RULES = """\
**Layouts.** Two layouts of an image were trained from the same weights for the same 4,200 steps on the same
conversations (the long round under `Commands`). In the first, the last scale is read if something follows the image;
the training of this checkpoint continued with it. In the paper's layout nothing reads the last scale. The models were
scored at commit {commit}, when implicit prompts were only of the five kinds that one pass solves.
"""
ABILITY_RULES = """\
**Other abilities.** Each is scored on held-out cases with its exact check (see `The abilities` below). The table has
the mean over the categories, then each of them. `thinking_without` has the prompts of `thinking` drawn without a
thought, and `thinking_plainly` has plain captions drawn with a thought. `psnr_outside` is the PSNR of an edit outside
of its mask, and `psnr_outside_bound` that of the tokenizer's own reconstruction there.
"""


def load_model(folder: str, tokenizer: str | None = None) -> NextFlowForConditionalGeneration:
    """Loads the trained model; its pixel decoder is that of the folder `tokenizer`, if one is given.

    Raises:
        ValueError: if that tokenizer differs in anything else, since its codes would not be those that the model
            learnt.
    """
    model = NextFlowForConditionalGeneration.from_pretrained(folder)
    if tokenizer is not None:
        own, other = model.vq_model.state_dict(), NextFlowVQModel.from_pretrained(tokenizer).state_dict()
        fits = own.keys() == other.keys() and all(own[name].shape == other[name].shape for name in own)
        fixed = [name for name in own if not name.startswith(DECODER)]
        changed = [name for name in fixed if not torch.equal(own[name], other[name])] if fits else ["its shape"]
        if changed:
            raise ValueError(
                f"Only the pixel decoder of {tokenizer} may differ from the tokenizer in {folder}, but these do: "
                f"{changed}. Train only the decoder stage, from that tokenizer."
            )
        model.vq_model.load_state_dict(other)
    return model


def image_sampling(
    values: dict[str, list[float] | None], num_scales: int, default: ImageSampling | None = None
) -> ImageSampling:
    """Makes settings from lists of one number, or of one for each scale. Raises `ValueError` for another length."""
    given = {name: value[0] if len(value) == 1 else value for name, value in values.items() if value is not None}
    sampling = replace(default or ImageSampling(), **given)
    for name in given:
        sampling.value_at(name, 0, num_scales)  # raises for a sequence of another length
    return sampling


def save_checkpoint(model: NextFlowForConditionalGeneration, processor, card: str | None, output: Path):
    """Writes the folder. Raises `ValueError` and writes nothing if the folder would then exceed `MAX_BYTES`."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if card is not None:
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        size = sum((_sizes(output) | _sizes(Path(folder))).values())
        if size > MAX_BYTES:
            raise ValueError(f"{output} would take {size} bytes, more than {MAX_BYTES}; take a smaller model.")
        shutil.copytree(folder, output, dirs_exist_ok=True)


def _sizes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


# --- Model card ---------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict:
    """Reads what `evaluate --json` writes: suite → category → score, with their command, commit and machine.

    Raises:
        ValueError: if the file lacks a suite.
    """
    results = json.loads(path.read_text())
    missing = [name for name in SUITES if name not in results]
    if missing:
        raise ValueError(f"{path} lacks the suites {missing}; write it with `transformers-nextflow evaluate --json`.")
    return results


def model_card(model: NextFlowForConditionalGeneration, results: dict, layouts: tuple[dict, dict] | None = None) -> str:
    """Returns the card: what the model is, its scores, and sections of the recipe's README.

    `layouts` are the scores of two models: one that reads the last scale, and one that does not.
    """
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=["nextflow", "text-to-image", "image-text-to-text", "next-scale-prediction"],
        widget=[{"text": text, "output": {"url": sheet}} for text, sheet in WIDGETS.items()],
        model_name=MODEL_NAME,
        eval_results=[
            EvalResult(
                "any-to-any", "shapes-world", "shapes world", "accuracy", round(scores["overall"], 4),
                dataset_config=suite, metric_name=f"{suite}, overall",
            )
            for suite, scores in results.items()
            if isinstance(scores, dict) and "overall" in scores
        ],
    )  # fmt: skip
    sampling, editing = model.default_image_sampling.to_dict(), model.default_editing_sampling.to_dict()
    introduction = INTRODUCTION.format(
        total=model.num_parameters() / 1e6,
        vision=model.vq_model.num_parameters() / 1e6,
        sheet=SHEET,
        prompt=WIDGET_PROMPT,
        sampling=", ".join(f"`{name}={sampling[name]}`" for name in SAMPLING),
        editing=", ".join(f"`{name}={editing[name]}`" for name in EDITING_SAMPLING),
    )
    machine = results["machine"]
    origin = ORIGIN.format(device=machine["gpu"] or machine["cpu"], **results)
    tables = [
        table(results) for table in (drawing_table, understanding_table, ability_table, tokenizer_table, oracle_table)
    ]
    if layouts is not None:
        tables.append(layout_table(*layouts))
    titles = ("Limits", "The world", "The abilities", "Commands")
    sections = [f"## {title}\n\n{recipe_section(title)}\n" for title in titles]
    return "\n".join([f"---\n{data.to_yaml()}\n---\n", introduction, origin, *tables, *sections])


def recipe_section(title: str) -> str:
    """Returns a section of the recipe's README, so that its text is written in one place."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", RECIPE.read_text(encoding="utf-8"), re.M | re.S)
    if found is None:
        raise ValueError(f"{RECIPE} has no section {title!r}; the model card takes it from there.")
    return found[1].strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _score(scores: dict[str, float], name: str) -> str:
    return f"{scores[name]:.3f}" if name in scores else ""


def drawing_table(results: dict) -> str:
    trained, held_out = results["text_to_image"], results["held_out_combinations"]
    header = ["drawing", "GenEval's rule", "strict", "held out, GenEval's rule", "held out, strict"]
    rows = [
        [name, *(_score(part, name + suffix) for part in (trained, held_out) for suffix in ("", "_strict"))]
        for name in trained
        if not name.endswith("_strict")
    ]
    return f"{DRAWING_RULES}\n{_table(header, rows)}"


def understanding_table(results: dict) -> str:
    rows = [[name, f"{score:.3f}"] for name, score in results["understanding"].items()]
    return f"{UNDERSTANDING_RULES}\n{_table(['understanding', 'right'], rows)}"


def ability_table(results: dict) -> str:
    """Returns a table with a row for each further suite, or "" for a checkpoint that was not trained on them."""
    suites = {name: scores for name, scores in results.items() if isinstance(scores, dict) and name not in SUITES}
    rows = [
        [name, _score(scores, "overall"), ", ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "overall")]
        for name, scores in suites.items()
        if name != "machine"
    ]
    return f"{ABILITY_RULES}\n{_table(['ability', 'overall', 'in detail'], rows)}" if rows else ""


def layout_table(read: dict, unread: dict) -> str:
    """Returns a table with a row for each suite that has an overall score, and one for the questions."""
    rows = [
        [name, _score(scores, "overall"), _score(unread[name], "overall")]
        for name, scores in read.items()
        if isinstance(scores, dict) and "overall" in scores
    ]
    rows.append(["questions", *(_score(part["understanding"], "questions") for part in (read, unread))])
    header = ["suite", "last scale read", "the paper's layout"]
    return f"{LAYOUT_RULES.format(commit=unread['commit'])}\n{_table(header, rows)}"


def tokenizer_table(results: dict) -> str:
    values = results["tokenizer"]
    whole = [[name, f"{value:.3f}"] for name, value in values.items() if "_scale_" not in name]
    scales = [name.removeprefix("usage_scale_") for name in values if name.startswith("usage_scale_")]
    by_scale = [[k, _score(values, f"usage_scale_{k}"), _score(values, f"perplexity_scale_{k}")] for k in scales]
    header = ["scale", "share of the codebook in use", "perplexity"]
    return "\n".join([TOKENIZER_RULES, _table(["tokenizer", ""], whole), _table(header, by_scale)])


def oracle_table(results: dict) -> str:
    rows = [[re.sub(r"\D", "", name), f"{score:.3f}"] for name, score in results["oracle"].items()]
    return f"{ORACLE_RULES}\n{_table(['true scales', 'exact'], rows)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/model", help="folder that train_transformer.py wrote")
    parser.add_argument("--processor", default="runs/data/processor", help="folder that make_data.py wrote")
    parser.add_argument(
        "--tokenizer", help="folder of the same vision tokenizer whose pixel decoder was trained further"
    )
    parser.add_argument("--output", type=Path, default=Path("checkpoints/nextflow-shapes"))
    parser.add_argument(
        "--results", type=Path, help="file with scores from `evaluate --json`, from which the model card is written"
    )
    parser.add_argument(
        "--layouts",
        type=Path,
        nargs=2,
        help="two files with scores: with the last scale read, and with the paper's layout",
    )
    per_scale = {"nargs": "+", "metavar": "VALUE", "help": "one number for all scales, or one for each"}
    parser.add_argument("--guidance_scale", type=float, **per_scale)
    parser.add_argument("--temperature", type=float, **per_scale)
    parser.add_argument("--top_k", type=int, **per_scale)
    parser.add_argument("--top_p", type=float, **per_scale)
    for name in EDITING_SAMPLING:
        parser.add_argument(f"--editing_{name}", type=float, nargs="+", metavar="VALUE", help="of edits and videos")
    arguments = parser.parse_args()

    model = load_model(arguments.model, arguments.tokenizer)
    processor = AutoProcessor.from_pretrained(arguments.processor)
    settings = {name: getattr(arguments, name) for name in SAMPLING}
    num_scales = len(model.config.vq_config.scales)
    sampling = image_sampling(settings, num_scales)
    settings = {name: getattr(arguments, f"editing_{name}") for name in EDITING_SAMPLING}
    model.generation_config = GenerationConfig(
        image_sampling=sampling.to_dict(),
        editing_sampling=image_sampling(settings, num_scales, default=sampling).to_dict(),
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.config.vq_config._name_or_path = ""  # it names a folder of this machine
    model.config.trained_on = trained_on(World())
    card = None
    if arguments.results:
        layouts = tuple(map(read_results, arguments.layouts)) if arguments.layouts else None
        card = model_card(model, read_results(arguments.results), layouts)
    save_checkpoint(model, processor, card, arguments.output)
    print(f"{arguments.output}: {sum(_sizes(arguments.output).values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
