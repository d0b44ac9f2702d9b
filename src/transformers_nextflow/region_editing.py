"""Drawing inside a region while the rest of a picture stays, on every scale. Ours; the paper has no such thing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .scale_schedule import ScaleSchedule


class KeptRegion:
    """What stays of pictures (B) while a region of each is drawn anew.

    A cell that lies outside of the region gets, on every scale, the code nearest to what the scales so far leave over
    of the picture. Coarse cells reach over the region's edge and change with it; the finer ones outside mend that.

    Args:
        vq_model: the vision tokenizer.
        pixel_values: B pictures, each (3, H, W) in [-1, 1], of the sizes that are drawn.
        regions: B masks (H, W) bool, True where is drawn.

    Raises:
        ValueError: for a region of another size than its picture, or one that covers nothing.
    """

    def __init__(self, vq_model: nn.Module, pixel_values: Sequence[torch.Tensor], regions: Sequence[torch.Tensor]):
        if len(regions) != len(pixel_values):
            raise ValueError(f"{len(regions)} regions came with {len(pixel_values)} pictures; give one for each.")
        for index, (pixels, region) in enumerate(zip(pixel_values, regions)):
            if region.shape != pixels.shape[-2:]:
                raise ValueError(
                    f"Region {index} has {tuple(region.shape)} pixels (height, width), its picture "
                    f"{tuple(pixels.shape[-2:])}; make them of one size."
                )
            if not bool(region.any()):
                raise ValueError(f"Region {index} covers nothing; mark at least one pixel that is to be drawn.")
        self.quantizer = vq_model.quantizer
        self.regions = list(regions)
        with torch.no_grad():
            self.latents = [vq_model.encode_latents(pixels[None])[0] for pixels in pixel_values]

    def keep_outside(
        self, drawn: torch.Tensor, codes_before: torch.Tensor, rows: slice | Sequence[int], schedule: ScaleSchedule
    ) -> torch.Tensor:
        """Codes of a scale (b, n) drawn for the pictures `rows`, with those outside of the regions replaced.

        `codes_before` (b, m) are the codes of all scales before.
        """
        rows = range(len(self.latents))[rows] if isinstance(rows, slice) else rows
        grid = schedule.grids[schedule.offsets.index(codes_before.shape[1])]
        residual = torch.stack([self.latents[row] for row in rows])
        if codes_before.shape[1] > 0:
            residual = residual - self.quantizer.decode(codes_before, schedule)
        regions = torch.stack([self.regions[row] for row in rows])[:, None].float()
        # A cell belongs to the region as soon as a pixel of it does.
        inside = F.adaptive_max_pool2d(regions, grid).flatten(1) > 0
        return torch.where(inside.to(drawn.device), drawn, self.quantizer.nearest(residual, grid))
