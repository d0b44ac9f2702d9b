"""Commands of `transformers-nextflow`, a file for each topic."""
