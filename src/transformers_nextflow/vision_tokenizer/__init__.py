"""Parts of the vision tokenizer: resampling between grids, the quantiser, pixel branches, the semantic decoder."""
