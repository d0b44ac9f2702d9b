"""Training of the optional diffusion decoder (paper, section 2.4)."""
