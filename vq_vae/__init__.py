"""The tokenizer: a VQ-VAE that turns a picture into a grid of codes and back."""
