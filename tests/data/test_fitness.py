"""Whether a tokenizer holds images is told by its own, unless it holds those badly, too."""

import pytest

from transformers_nextflow.data.fitness import Fit


@pytest.mark.parametrize(
    ("psnr", "own", "is_fit"),
    [(21.0, 25.0, True), (19.0, 25.0, False), (18.5, None, True), (17.0, None, False), (13.3, 11.2, False)],
)
def test_a_tokenizer_that_was_hardly_trained_is_not_fit_for_what_it_was_trained_on(psnr, own, is_fit):
    assert Fit(psnr=[psnr, psnr], own=own).is_fit is is_fit
