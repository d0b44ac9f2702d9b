"""The parts of the shapes recipe (`examples/shapes`) that the ablations use."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
from make_data import FEATURES, images_in, make_processor, row  # noqa: E402
from train_tokenizer import KMEANS_SHARES, ShapesImages, ShapesVQTrainer, tokenizer_config  # noqa: E402
from train_transformer import model_config  # noqa: E402


__all__ = [
    "FEATURES", "KMEANS_SHARES", "ShapesImages", "ShapesVQTrainer", "make_processor", "model_config", "images_in",
    "row", "tokenizer_config",
]  # fmt: skip
