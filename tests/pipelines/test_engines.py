"""What engines that serve any pipeline of diffusers as a black box do with ours (docs/serving.md): load the folder by
`DiffusionPipeline`, keep the arguments that the signature of the call names, and call in inference mode.
"""

import inspect

import torch
from diffusers import DiffusionPipeline
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline


# What such an engine may fill in from a request, whatever the pipeline.
FILLED_IN = {
    "prompt": ["one two"],
    "negative_prompt": None,
    "num_inference_steps": 50,
    "true_cfg_scale": 4.0,
    "height": 16,
    "width": 16,
    "num_frames": 1,
    "num_images_per_prompt": 2,
    "output_type": "pt",
    "fps": 24,
}


def test_a_black_box_engine_loads_filters_and_calls(tmp_path):
    own = NextFlowPipeline(tiny_model().eval(), tiny_processor())
    own.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, trust_remote_code=True)
    parameters = inspect.signature(pipe.__call__).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    kept = {name: value for name, value in FILLED_IN.items() if name in parameters}
    assert kept.keys() == {"prompt", "negative_prompt", "height", "width", "num_images_per_prompt", "output_type"}
    with torch.inference_mode():
        drawn = pipe(**kept, generator=torch.Generator().manual_seed(0)).images
    assert torch.is_tensor(drawn) and drawn.shape == (2, 3, 16, 16)
    again = own(**kept, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(drawn, again)
