"""The tokenizer in use: a frozen VQ-VAE, loaded from a checkpoint and identified by its fingerprint.

Token files and world models carry the fingerprint of the tokenizer that they belong to. A tokenizer with
another decoder (train_decoder.py) has the same one, since its tokens are the same, and its own checksum.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import checkpoint
from runtime.checkpoint import SHIPPED, CheckpointError, build, content_of, load
from runtime.device import autocast
from runtime.video import to_float
from vq_vae.vq_vae import DECODER_FIELDS, VQVAE, VQVAEConfig

SHIPPED_TOKENIZER = SHIPPED / "vqvae.pt"
TOKENIZER_KIND = "vq_vae"
KERNEL = 3  # of the decoder's first convolution
BATCH = 64  # pictures that go through the network together


class Tokenizer:
    """A frozen VQ-VAE with its fingerprint.

    It is not a Module, so its weights are not among the parameters of a world model that holds it.
    """

    def __init__(self, vqvae: VQVAE, path: str | Path = "", fingerprint: str = ""):
        self.vqvae = vqvae.requires_grad_(False).eval()
        self.path = Path(path)
        self.checksum = checksum(vqvae)
        self.fingerprint = fingerprint or self.checksum  # of the tokens
        self._first_layer = first_layer_table(vqvae)

    @property
    def config(self) -> VQVAEConfig:
        """Picture size, grid size and codebook size."""
        return self.vqvae.config

    @property
    def codebook(self) -> Tensor:
        """Code vectors [V, E]."""
        return self.vqvae.quantizer.codebook

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codebook.device

    def to(self, device: torch.device | str) -> "Tokenizer":
        """Moves the weights."""
        self.vqvae.to(device)
        self._first_layer = self._first_layer.to(device)
        return self

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, Hp, Wp] in [0, 1] -> encoder outputs [B, E, H, W], not quantized."""
        return self.vqvae.encoder(pictures.contiguous(memory_format=torch.channels_last))

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, Hp, Wp] in [0, 1] -> tokens [B, H, W] int64. Raises ValueError for another size."""
        return self.vqvae.encode(pictures)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> pictures [B, 3, Hp, Wp] float32 in [0, 1]; tokens [H, W] -> one picture.

        As `VQVAE.decode_code`, but the decoder's first layer, half of its work, is looked up.
        """
        if tokens.dim() == 2:
            return self.decode(tokens[None])[0]
        first, *others = self.vqvae.decoder
        x = convolve_tokens(tokens, self._first_layer) + first.bias[:, None, None]
        for layer in others:
            x = layer(x)
        return x.float().clamp(0, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, E, H, W] -> pictures [B, 3, Hp, Wp], with gradients."""
        return self.vqvae.decode(vectors)

    @torch.inference_mode()
    def encode_frames(self, frames: np.ndarray | Tensor) -> Tensor:
        """Any number of frames [K, Hp, Wp, 3] uint8, or [K, 3, Hp, Wp] float in [0, 1] -> tokens [K, H, W]
        int64 on the CPU. Computed in float32: bfloat16 distances pick wrong codes."""
        frames = torch.as_tensor(frames)
        if frames.dtype == torch.uint8:
            frames = to_float(frames)
        return torch.cat([self.encode(part.to(self.device)).cpu() for part in frames.split(BATCH)])

    @torch.inference_mode()
    def decode_frames(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Any number of grids [K, H, W] -> pictures [k, 3, Hp, Wp] in [0, 1] on the CPU, batch by batch."""
        for part in tokens.split(BATCH):
            with autocast(self.device, dtype):
                pictures = self.decode(part.to(self.device))
            yield pictures.cpu()


@torch.no_grad()
def first_layer_table(vqvae: VQVAE) -> Tensor:
    """What each code adds to the output of the decoder's first convolution, of k x k places and C channels,
    from each place of the kernel: [(V + 1) * k * k, C]. The last code: zeros around the grid."""
    weight, codebook = vqvae.decoder[0].weight, vqvae.quantizer.codebook
    table = torch.einsum("vd,cdij->vijc", codebook, weight.float())
    return torch.cat([table, torch.zeros_like(table[:1])]).flatten(0, 2).contiguous()


def convolve_tokens(tokens: Tensor, table: Tensor) -> Tensor:
    """The convolution of a `first_layer_table`, without its bias: tokens [B, H, W] -> [B, C, H, W]."""
    places = KERNEL * KERNEL
    codes = len(table) // places - 1
    padded = F.pad(tokens.long(), [KERNEL // 2] * 4, value=codes)
    around = padded.unfold(1, KERNEL, 1).unfold(2, KERNEL, 1).flatten(3)  # [B, H, W, places]
    rows = around * places + torch.arange(places, device=tokens.device)
    return F.embedding_bag(rows.flatten(0, 2), table, mode="sum").view(*tokens.shape, -1).movedim(-1, 1)


def checksum(vqvae: VQVAE) -> str:
    """16 hex digits: sha256 of the config and of all weights that tokens or pictures depend on."""
    weights = {name: tensor for name, tensor in vqvae.state_dict().items() if "ema_" not in name}
    config = asdict(vqvae.config)
    for name in DECODER_FIELDS:  # at its default it is left out: older tokenizers keep their fingerprint
        if config[name] == getattr(VQVAEConfig, name):
            del config[name]
    return checkpoint.fingerprint(config, weights)


def tokenizer_content(vqvae: VQVAE, fingerprint: str = "", **extra) -> dict:
    """The dict that `load_tokenizer` reads, with `extra` plain values (constants, step, metrics, ...).

    `fingerprint`: that of the tokenizer whose encoder and codebook it has; "": they are its own.
    """
    found = checksum(vqvae)
    return content_of(TOKENIZER_KIND, vqvae, fingerprint=fingerprint or found, checksum=found, **extra)


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer in `path`, on `device`.

    Raises CheckpointError if the file is missing or broken, or was changed after it was written.
    """
    content = load(path, TOKENIZER_KIND, needed=("fingerprint",))
    tokenizer = Tokenizer(build(VQVAE, VQVAEConfig, content, path), path, content["fingerprint"])
    expected = content.get("checksum", tokenizer.fingerprint)
    if tokenizer.checksum != expected:
        raise CheckpointError(
            f"{path}: its weights have checksum {tokenizer.checksum}, the file says {expected}; it was "
            "changed after it was written: copy or train it again"
        )
    return tokenizer.to(device)


def check_tokenizer(expected: str, found: str, what: str, whose: str) -> None:
    """Raises CheckpointError unless two tokenizer fingerprints agree.

    `what` was made by tokenizer `found`; `whose` is the file that needs tokenizer `expected`.
    """
    if expected != found:
        raise CheckpointError(
            f"{what} was made by tokenizer {found}, but {whose} belongs to tokenizer {expected}; "
            "change one of the two: encode the clips again, or give files that belong together"
        )
