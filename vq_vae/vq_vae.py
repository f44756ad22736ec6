"""The VQ-VAE: 128x72 pictures to 32x18 grids of codes and back (any size divisible by 4).

van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937. The codebook is an
exponential moving average (EMA) of encoder outputs (appendix A.1); vectors of the batch replace dead codes.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4  # two stride-2 stages
TRANSPOSED, SHUFFLE = UPSAMPLING = ("transposed", "shuffle")
DECODER_FIELDS = ("upsampling", "fine_blocks")  # fields of the config that tokens do not depend on


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of the tokenizer. `height` and `width` are those of the picture, in pixels."""

    height: int = 72
    width: int = 128
    codebook_size: int = 1024
    embedding_dim: int = 384
    hidden_dim: int = 128
    residual_blocks: int = 2
    commitment: float = 0.05
    ema_decay: float = 0.99
    upsampling: str = TRANSPOSED  # of the decoder: one of UPSAMPLING
    fine_blocks: int = 0  # residual blocks of the decoder at half of the picture's size

    def __post_init__(self):
        if self.upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling {self.upsampling!r}: expected {' or '.join(UPSAMPLING)}")
        if self.height % STRIDE or self.width % STRIDE:
            raise ValueError(f"picture size {self.width}x{self.height}: sides must be divisible by {STRIDE}")

    @property
    def latent_size(self) -> tuple[int, int]:
        """(rows, columns) of the token grid."""
        return self.height // STRIDE, self.width // STRIDE


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), as in the VQ-VAE paper."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """[B, 3, Hp, Wp] -> [B, embedding_dim, Hp/4, Wp/4]."""
    c = config.hidden_dim
    return nn.Sequential(
        nn.Conv2d(3, c // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(c // 2, c, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(c, c, 3, padding=1),
        *[ResidualBlock(c) for _ in range(config.residual_blocks)],
        nn.ReLU(),
        nn.Conv2d(c, config.embedding_dim, 1),
    )


def upsample(config: VQVAEConfig, channels: int, out: int) -> nn.Module:
    """[B, channels, H, W] -> [B, out, 2H, 2W].

    `transposed`: a transposed convolution, in which an output pixel reads 2x2 inputs; it leaves a pattern of
    dots. `shuffle`: a 3x3 convolution and a pixel shuffle (arXiv 1609.05158), which can do the same and reads
    3x3 (`shuffle_weights`).
    """
    if config.upsampling == TRANSPOSED:
        return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(channels, 4 * out, 3, padding=1), nn.PixelShuffle(2))


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """[B, embedding_dim, H, W] -> [B, 3, 4H, 4W] in [0, 1]; the encoder mirrored."""
    c = config.hidden_dim
    return nn.Sequential(
        nn.Conv2d(config.embedding_dim, c, 3, padding=1),
        *[ResidualBlock(c) for _ in range(config.residual_blocks)],
        nn.ReLU(),
        upsample(config, c, c // 2),
        *[ResidualBlock(c // 2) for _ in range(config.fine_blocks)],
        nn.ReLU(),
        upsample(config, c // 2, 3),
        nn.Sigmoid(),
    )


def shuffle_weights(transposed: nn.ConvTranspose2d) -> dict[str, Tensor]:
    """Weight [4 * out, in, 3, 3] and bias of the convolution that, with a pixel shuffle, equals a transposed
    convolution of kernel 4, stride 2, padding 1.

    Output pixel 2i + a reads input i + t - 1 through place a + 3 - 2t of the kernel, for t in 0..2.
    """
    given = transposed.weight.detach()  # [in, out, 4, 4]
    weight = given.new_zeros(given.shape[1], 2, 2, given.shape[0], 3, 3)
    places = [(a, t, a + 3 - 2 * t) for a in range(2) for t in range(3) if 0 <= a + 3 - 2 * t < 4]
    for a, t, k in places:
        for b, u, m in places:
            weight[:, a, b, :, t, u] = given[:, :, k, m].T
    bias = transposed.bias.detach().repeat_interleave(4)
    return {"weight": weight.flatten(0, 2), "bias": bias}


@torch.no_grad()
def with_shuffle_decoder(vqvae: "VQVAE", fine_blocks: int) -> "VQVAE":
    """A copy whose decoder has pixel shuffles and `fine_blocks`, and gives the same pictures at first.

    Encoder and codebook are the same, so its tokens are. Raises ValueError if it has such a decoder already.
    """
    old = vqvae.config
    if old.upsampling != TRANSPOSED or old.fine_blocks:
        raise ValueError("the decoder has no transposed convolutions to replace")
    new = VQVAE(replace(old, upsampling=SHUFFLE, fine_blocks=fine_blocks))
    new.encoder.load_state_dict(vqvae.encoder.state_dict())
    new.quantizer.load_state_dict(vqvae.quantizer.state_dict())
    kept = iter(vqvae.decoder)
    for layer in new.decoder:
        if isinstance(layer, ResidualBlock) and layer.layers[1].in_channels != old.hidden_dim:
            nn.init.zeros_(layer.layers[-1].weight)
            nn.init.zeros_(layer.layers[-1].bias)
            continue
        given = next(kept)
        if isinstance(given, nn.ConvTranspose2d):
            layer[0].load_state_dict(shuffle_weights(given))
        else:
            layer.load_state_dict(given.state_dict())
    return new


class VectorQuantizerEMA(nn.Module):
    """Nearest-code quantizer whose codebook is an exponential moving average of encoder outputs.

    Computed in float32 under any autocast: bfloat16 distances pick wrong codes.
    """

    DEAD_BELOW = 0.03  # a code used less than this share of the mean use is replaced by a vector of the batch
    FRESH_COUNT = 0.1  # its use count is then this share of the mean, so it stays for some hundred batches

    def __init__(self, codebook_size: int, embedding_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        codebook = torch.randn(codebook_size, embedding_dim)
        self.register_buffer("codebook", codebook)  # [V, D]
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", codebook.clone())
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def nearest(self, flat: Tensor) -> Tensor:
        """[N, D] float32 -> [N] index of the nearest code (squared Euclidean distance)."""
        # |x - e|^2 = |x|^2 - 2 x.e + |e|^2, and |x|^2 does not change the order.
        with torch.autocast(flat.device.type, enabled=False):
            return torch.addmm(self.codebook.square().sum(1), flat, self.codebook.t(), alpha=-2).argmin(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, D, H, W] -> quantized [B, D, H, W] (straight-through), tokens [B, H, W], commitment MSE."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            B, D, H, W = z.shape
            flat = z.permute(0, 2, 3, 1).reshape(-1, D)
            # One value that is not finite would stay in the codebook's averages for ever.
            learns = self.training and bool(flat.isfinite().all())
            if learns and not self.initialised:
                self._seed(flat.detach())
            tokens = self.nearest(flat.detach())
            if learns:
                self._update(flat.detach(), tokens)
            quantized = self.lookup(tokens.view(B, H, W))
            commitment = F.mse_loss(z, quantized)
            return z + (quantized - z).detach(), tokens.view(B, H, W), commitment

    def lookup(self, tokens: Tensor) -> Tensor:
        """[B, H, W] -> code vectors [B, D, H, W]."""
        return F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _seed(self, flat: Tensor) -> None:
        """Initialises the codebook with encoder outputs, so that no code is far from all data."""
        self.codebook.copy_(_sample_rows(flat, len(self.codebook)))
        self.ema_sum.copy_(self.codebook)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, flat: Tensor, tokens: Tensor) -> None:
        """EMA step of counts, sums and codebook from encoder outputs [N, D] and their tokens [N]."""
        count = torch.bincount(tokens, minlength=len(self.codebook)).float()
        total = torch.zeros_like(self.ema_sum).index_add_(0, tokens, flat)
        self.ema_count.lerp_(count, 1 - self.decay)
        self.ema_sum.lerp_(total, 1 - self.decay)
        self.codebook.copy_(self.ema_sum / self.ema_count.clamp_min(1e-5)[:, None])
        mean_count = len(flat) / len(self.codebook)
        dead = (self.ema_count < self.DEAD_BELOW * mean_count).nonzero().flatten()
        if len(dead):
            fresh = _sample_rows(flat, len(dead))
            self.codebook[dead] = fresh
            self.ema_count[dead] = self.FRESH_COUNT * mean_count
            self.ema_sum[dead] = fresh * self.FRESH_COUNT * mean_count


def _sample_rows(flat: Tensor, n: int) -> Tensor:
    """n random rows of [N, D], without repeats if there are enough."""
    repeats = -(-n // len(flat))
    order = torch.cat([torch.randperm(len(flat), device=flat.device) for _ in range(repeats)])
    return flat[order[:n]]


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder. Pictures are [B, 3, Hp, Wp] RGB in [0, 1]; tokens [B, H, W] int64."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = VectorQuantizerEMA(config.codebook_size, config.embedding_dim, config.ema_decay)
        self.decoder = build_decoder(config)
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> reconstruction [B, 3, Hp, Wp], tokens [B, H, W], commitment MSE (scalar, unweighted)."""
        quantized, tokens, commitment = self.quantizer(self.encoder(pictures))
        return self.decoder(quantized).float(), tokens, commitment

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, Hp, Wp] in [0, 1] -> tokens [B, H, W] int64. Never updates the codebook.

        Raises ValueError if the picture is not of the size that this tokenizer was trained for.
        """
        want = (3, self.config.height, self.config.width)
        if tuple(pictures.shape[1:]) != want:
            raise ValueError(f"pictures are {list(pictures.shape)}; this tokenizer takes [B, *{list(want)}]")
        z = self.encoder(pictures.contiguous(memory_format=torch.channels_last)).float()
        B, D, H, W = z.shape
        return self.quantizer.nearest(z.permute(0, 2, 3, 1).reshape(-1, D)).view(B, H, W)

    def decode(self, quantized: Tensor) -> Tensor:
        """Code vectors [B, D, H, W] (may carry gradients) -> pictures [B, 3, Hp, Wp] float32."""
        return self.decoder(quantized.contiguous(memory_format=torch.channels_last)).float()

    def decode_code(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, W] -> pictures [B, 3, Hp, Wp]; tokens [H, W] -> one picture [3, Hp, Wp]."""
        if tokens.dim() == 2:
            return self.decode_code(tokens[None])[0]
        if tokens.dim() != 3:
            raise ValueError(f"tokens are {list(tokens.shape)}; expected [H, W] or [B, H, W]")
        return self.decode(self.quantizer.lookup(tokens.long()))
