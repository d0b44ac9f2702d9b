"""Commands of `transformers-nextflow` in files by their topics."""
