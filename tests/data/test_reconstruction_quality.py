"""Images are compared with those that a tokenizer was trained on, unless it reconstructs even those badly."""

import pytest

from transformers_nextflow.data.reconstruction_quality import ReconstructionQuality


@pytest.mark.parametrize(
    ("psnr", "own", "is_sufficient"),
    [(21.0, 25.0, True), (19.0, 25.0, False), (18.5, None, True), (17.0, None, False), (13.3, 11.2, False)],
)
def test_a_tokenizer_that_was_hardly_trained_does_not_reconstruct_well_what_it_was_trained_on(psnr, own, is_sufficient):
    assert ReconstructionQuality(psnr=[psnr, psnr], own=own).is_sufficient is is_sufficient
