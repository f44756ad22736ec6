"""The tokenizer in use: what it decodes."""

import torch
from tiny_world import tiny_vqvae

from vq_vae.tokenizer import Tokenizer


def test_decoder_with_its_first_layer_looked_up_is_the_same():
    """In batches, for one picture, and at the grid's borders, where the convolution sees zeros."""
    torch.manual_seed(0)
    vqvae = tiny_vqvae()
    tokenizer = Tokenizer(vqvae)
    rows, columns = vqvae.config.latent_size
    tokens = torch.randint(0, vqvae.config.codebook_size, (3, rows, columns))
    expected = vqvae.decode_code(tokens).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokenizer.decode(tokens[1]), expected[1], rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3, "not one colour"
