"""The tokenizer: a VQ-VAE that encodes a picture as a grid of tokens and decodes it; its training."""
