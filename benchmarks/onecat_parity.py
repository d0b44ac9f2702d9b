"""Compare a converted OneCAT and its vision tokenizer with the outputs of the original code.

    python benchmarks/onecat_parity.py FOLDER

FOLDER holds a tiny model in the released layout (`onecat_tiny.safetensors`, `onecat_tiny.json`), a tiny vision
tokenizer (`infinity_vae_tiny.pth`), and the outputs of the original code with both (`onecat_tiny_outputs.safetensors`,
`infinity_vae_tiny_outputs.safetensors`): three drawings, one of which is an edit, an answer to a question about an
image, an answer without an image, and three images through the tokenizer. Codes are compared bit by bit. Everything
else (input features, hidden states, logits, guided logits, sums, images) is compared by value. Writes
`results/onecat_parity.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from backbone import RESULTS
from safetensors.torch import load_file

from transformers_nextflow import (
    BitwiseEditingSampling,
    BitwiseImageSampling,
    BitwiseVQModel,
    OneCatForConditionalGeneration,
)
from transformers_nextflow.conversion.onecat import KEYS, onecat_config, read_vision_tokenizer
from transformers_nextflow.evaluation.results import write_result


LEVELS = [[128, 5], [256, 7]]
# The tolerances of values, and of logits under a guidance of 20.
TOLERANCE, GUIDED_TOLERANCE = 1e-4, 1e-3
DRAWINGS = {
    "greedy": BitwiseImageSampling(guidance_scale=3.0, temperature=0.5, top_k=1),
    "sampled": BitwiseImageSampling(guidance_scale=20.0, temperature=0.5, top_k=2, top_p=0.97),
    # They equal a cfg of 3 for text and of 1.5 for images in the original.
    "edit": BitwiseEditingSampling(guidance_scale=3.0, image_guidance_scale=3 / 2.5, temperature=0.5, top_k=1),
    "rounded": BitwiseImageSampling(guidance_scale=3.0, temperature=0.5, top_k=1),
}


def load_models(folder: Path, **config_values) -> tuple[OneCatForConditionalGeneration, BitwiseVQModel]:
    """Loads the model of the fixture with its vision tokenizer, by the key tables of the converter."""
    told, (vq_config, vq_state) = (
        json.loads((folder / "onecat_tiny.json").read_text()),
        read_vision_tokenizer(folder / "infinity_vae_tiny.pth"),
    )
    vq_config.levels, ids = LEVELS, told["token_ids"]
    config = onecat_config(
        told["config"], vq_config, image_token_id=ids["img_context"], reference_token_id=ids["ref_context"]
    )
    for name, value in ({"drawing_frequencies": "float32"} | config_values).items():
        setattr(config, name, value)
    model = OneCatForConditionalGeneration(config).eval()
    state = KEYS.forward(load_file(folder / "onecat_tiny.safetensors"))
    model.load_state_dict(state | {f"vq_model.{name}": value for name, value in vq_state.items()})
    return model, model.vq_model


def differences(found: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((value - original[name]).abs().max()) for name, value in found.items()}


@torch.no_grad()
def draw(model, name: str, original: dict[str, torch.Tensor]) -> tuple[bool, dict[str, float]]:
    """Returns whether all bits of a drawing are those of the original, and the largest difference of each value."""
    source = "greedy" if name == "rounded" else name
    sampling, stored = DRAWINGS[name], [key.split(".") for key in original if key.endswith(".input_ids")]
    # Each pass has less of the conditioning than the one before, so it is shorter.
    passes = [key[1] for key in stored if key[0] == source and len(key) == 3]
    passes.sort(key=lambda part: -len(original[f"{source}.{part}.input_ids"]))
    prompts = [original[f"{source}.{part}.input_ids"][None] for part in passes]
    contexts = dict(zip(("negative_input_ids", "unconditional_input_ids"), prompts[1:]))
    if name == "edit":
        pixels = original["edit.pixel_values"]
        contexts |= {"pixel_values": pixels, "pixel_sizes": torch.tensor([pixels.shape[-2:]])}
    schedule, bits, logits = original[f"{source}.schedule"].tolist(), [], []

    def keep(model, scale, state):
        height, width = schedule[scale]
        codes = state.image_tokens[0][-height * width :]
        bits.append(model.vq_model.quantizer.to_bits(codes))
        logits.append(state.logits[0] / sampling.temperature)

    read = []
    hook = model.visual_head.register_forward_hook(lambda head, inputs, output: read.append((inputs[0], output)))
    size = (schedule[-1][0] * 16, schedule[-1][1] * 16)
    output = model.generate_images(
        prompts[0], image_sizes=[size], sampling=sampling, callback=keep,
        generator=torch.Generator().manual_seed(1234), **contexts,
    )  # fmt: skip
    hook.remove()
    equal = all(torch.equal(own, original[f"{name}.bits.{k}"].long()) for k, own in enumerate(bits))
    found, tokens, (own_schedule,) = {}, output.image_tokens, model.schedules_of(output.image_grids)
    for scale, values in enumerate(read):
        for kind, value in zip(("hidden", "logits"), values):
            found |= {f"{name}.{part}.{kind}.{scale}": own[0] for part, own in zip(passes, value)}
        feature = model.slot_features(tokens, own_schedule, scale)
        found[f"{name}.feature.{scale}"] = feature[0]
        found[f"{name}.slots.{scale}"] = model.embed_slots(feature, scale)[0]
        found[f"{name}.guided.{scale}"] = logits[scale].unflatten(-1, (-1, 2))
    found[f"{name}.sum"] = model.vq_model.quantizer.decode(tokens, own_schedule)
    found[f"{name}.image"] = model.decode_image_tokens(tokens, output.image_grids)[0][None]
    # For the rounded frequencies there are only hidden states and bits.
    return equal, differences({key: value for key, value in found.items() if key in original}, original)


@torch.no_grad()
def answer(model, name: str, original: dict[str, torch.Tensor]) -> tuple[bool, dict[str, float]]:
    """Returns whether an answer has the tokens of the original, and the largest difference of each value."""
    ids, images = original[f"{name}.input_ids"][None], {}
    if name == "chat":
        views = [original["chat.pixel_values"][0], original["chat.thumbnail"][0]]
        height, width = (max(view.shape[axis] for view in views) for axis in (1, 2))
        padded = [torch.nn.functional.pad(v, (0, width - v.shape[2], 0, height - v.shape[1])) for v in views]
        images = {"pixel_values": torch.stack(padded), "pixel_sizes": torch.tensor([v.shape[1:] for v in views])}
    tokens = original[f"{name}.generated"][1:]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0, **images,
    )  # fmt: skip
    found = {
        f"{name}.prompt_logits": model(ids, **images).logits[0],
        f"{name}.step_logits": torch.cat(output.logits),
    }
    if name == "chat":
        found["chat.prompt_embeds"] = model.embed_prompts(ids, **images)[0][0]
    return torch.equal(output.sequences[0, ids.shape[1] :], tokens), differences(found, original)


@torch.no_grad()
def tokenize(vq_model: BitwiseVQModel, name: str, original: dict[str, torch.Tensor]) -> tuple[bool, dict[str, float]]:
    """Returns whether all bits of an image are those of the original, and the largest difference of each value."""
    pixels, quantizer = original[f"{name}.image"].float(), vq_model.quantizer
    schedule, tokens = vq_model.schedule_of(pixels), vq_model.encode(pixels).image_tokens
    found = {f"{name}.latent": vq_model.encode_latents(pixels), f"{name}.reconstruction": vq_model(pixels)}
    equal = True
    for scale, codes in enumerate(schedule.split(tokens)):
        equal &= torch.equal(quantizer.to_bits(codes), original[f"{name}.bits.{scale}"].long())
        prefix = tokens[:, : schedule.offsets[scale + 1]]
        found[f"{name}.prefix_sum.{scale}"] = quantizer.decode(prefix, schedule)
        if f"{name}.prefix_image.{scale}" in original:
            found[f"{name}.prefix_image.{scale}"] = vq_model.decode(prefix, schedule)
    found[f"{name}.sum_from_bits"] = quantizer.decode(tokens, schedule)
    return equal, differences(found, original)


def parity(folder: Path) -> dict[str, dict]:
    """Returns for each case whether codes are equal, and the largest difference of guided logits and of the rest."""
    model, vq_model = load_models(folder)
    rounded, _ = load_models(folder, drawing_frequencies="bfloat16")
    outputs = load_file(folder / "onecat_tiny_outputs.safetensors")
    images = load_file(folder / "infinity_vae_tiny_outputs.safetensors")
    found = {name: draw(rounded if name == "rounded" else model, name, outputs) for name in DRAWINGS}
    found |= {name: answer(model, name, outputs) for name in ("chat", "text")}
    found |= {f"tokenizer {name}": tokenize(vq_model, name, images) for name in ("square", "tall", "small")}
    cases = {}
    for name, (equal, errors) in found.items():
        guided = [value for key, value in errors.items() if ".guided." in key]
        rest = [value for key, value in errors.items() if ".guided." not in key]
        cases[name] = {"codes_equal": equal, "max_abs_error": max(rest), "guided_error": max(guided, default=0.0)}
        cases[name]["values"] = len(errors)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    cases = parity(arguments.folder)
    values = {
        "codes_equal": all(case["codes_equal"] for case in cases.values()),
        "max_abs_error": max(case["max_abs_error"] for case in cases.values()),
        "guided_error": max(case["guided_error"] for case in cases.values()),
        "cases": cases,
    }
    print(json.dumps(values, indent=2))
    print("written", write_result(arguments.results / "onecat_parity.json", values))
    if not values["codes_equal"] or values["max_abs_error"] > TOLERANCE or values["guided_error"] > GUIDED_TOLERANCE:
        raise SystemExit(
            f"Codes differ, or a value differs by more than {TOLERANCE} (guided logits: {GUIDED_TOLERANCE})."
        )


if __name__ == "__main__":
    main()
