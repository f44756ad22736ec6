"""The baseline world model: a ConvGRU over grids of tokens, conditioned on the action by FiLM.

    tokens[t] --embed, 1x1--> x --FiLM(actions[t])--> ConvGRU layer --FiLM--> ... --1x1--> logits[t]

logits[t] are over the tokens of frame t+1; actions[t] leads from frame t to frame t+1.
model_geometry.py uses the same recurrent cell.

FiLM: Perez et al., arXiv 1709.07871. ConvGRU: Ballas et al., arXiv 1511.06432.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from vq_vae.code_space import init_from_codebook
from vq_vae.tokenizer import Tokenizer


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of the ConvGRU world model. Codebook and grid size are the tokenizer's."""

    codebook_size: int
    latent_height: int = 18
    latent_width: int = 32
    embed_dim: int = 256
    hidden_dim: int = 384
    layers: int = 6
    kernel_size: int = 3
    action_dim: int = 5
    film_hidden: int = 128


class ConvGRUCell(nn.Module):
    """A convolutional GRU cell; the gates z and r come from one fused convolution."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        pad = kernel_size // 2
        self.gates = nn.Conv2d(2 * channels, 2 * channels, kernel_size, padding=pad)
        self.candidate = nn.Conv2d(2 * channels, channels, kernel_size, padding=pad)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        """x, h [B, C, H, W] -> new h [B, C, H, W]. None: an empty state (zeros), at half the cost."""
        if h is None:
            c, pad = x.shape[1], self.candidate.padding
            z = torch.sigmoid(F.conv2d(x, self.gates.weight[:c, :c], self.gates.bias[:c], padding=pad))
            candidate = F.conv2d(x, self.candidate.weight[:, :c], self.candidate.bias, padding=pad)
            return (torch.tanh(candidate) * z).float()
        z, r = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        candidate = torch.tanh(self.candidate(torch.cat([x, r * h], 1)))
        # The state stays float32 under autocast: bfloat16 would lose its small updates over a long rollout.
        return torch.lerp(h, candidate.to(h.dtype), z.to(h.dtype))


@dataclass
class Prediction:
    """What is predicted of the next frame before tokens are sampled."""

    features: Tensor  # [B, C, H, W]
    visible_mask: None = None  # this model does not warp


class ConvGRUWorldModel(nn.Module):
    """Predicts the next grid of tokens from this one, the action and a persistent state [L, B, C, H, W]."""

    def __init__(self, config: WorldModelConfig, tokenizer: Tokenizer | None = None):
        """`tokenizer` is needed only to initialise from its codebook and to decode rollouts."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        c, layers = config.hidden_dim, config.layers
        self.embed = nn.Embedding(config.codebook_size, config.embed_dim)
        self.in_proj = nn.Conv2d(config.embed_dim, c, 1)
        self.film = nn.Sequential(
            nn.Linear(config.action_dim, config.film_hidden),
            nn.SiLU(),
            nn.Linear(config.film_hidden, layers * 2 * c),
        )
        self.cells = nn.ModuleList(ConvGRUCell(c, config.kernel_size) for _ in range(layers))
        self.head = nn.Conv2d(c, config.codebook_size, 1)
        self.gradient_checkpointing = False
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_from_codebook(self) -> None:
        """Starts the embedding and the head on the principal components of the tokenizer's codebook.

        Similar codes start with similar weights. The root mean square of the embedding is 1.
        """
        init_from_codebook(self.embed.weight, self.tokenizer.codebook, 1.0)
        init_from_codebook(self.head.weight, self.tokenizer.codebook)

    def compute_embeddings(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, H, W] (or [B, H, W]) -> projected embeddings [B, T, C, H, W] (or [B, C, H, W])."""
        lead = tokens.shape[:-2]
        x = self.embed(tokens.reshape(-1, *tokens.shape[-2:])).permute(0, 3, 1, 2)
        x = self.in_proj(x)
        return x.view(*lead, *x.shape[1:])

    def compute_film(self, actions: Tensor) -> Tensor:
        """Actions [..., A] -> gamma and beta [..., L, 2, C]; layers take x * (1 + gamma) + beta."""
        film = self.film(actions)
        return film.view(*actions.shape[:-1], self.config.layers, 2, self.config.hidden_dim)

    def init_state(self, batch: int, device: torch.device | None = None) -> Tensor:
        """A state without observations: zeros [L, B, C, H, W]."""
        g = self.config
        return torch.zeros(g.layers, batch, g.hidden_dim, g.latent_height, g.latent_width, device=device)

    def recur(self, x: Tensor, film: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One frame through the ConvGRU stack.

        x [B, C, H, W] embedded tokens, film [B, L, 2, C], state [L, B, C, H, W]
        -> features [B, C, H, W] (the last layer's state), new state [L, B, C, H, W].
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recompute(self._recur, x, film, state, use_reentrant=False)
        return self._recur(x, film, state)

    def _recur(self, x: Tensor, film: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        new = []
        for i, cell in enumerate(self.cells):
            gamma, beta = film[:, i, :, :, None, None].unbind(1)  # [B, C, 1, 1] each
            x = cell(x * (1 + gamma) + beta, state[i])
            new.append(x)
        return x, torch.stack(new)

    @staticmethod
    def select_worlds(state: Tensor, index: slice) -> Tensor:
        """The state of some worlds of the batch."""
        return state[:, index]

    @staticmethod
    def pose_of(state: Tensor) -> None:
        """This model has no pose."""

    def predict(
        self,
        tokens: Tensor,
        actions: Tensor,
        state: Tensor,
        observed: bool = True,
        picture: Tensor | None = None,
        true_pose: Tensor | None = None,
    ) -> tuple[Prediction, Tensor]:
        """One step: tokens [B, H, W], actions [B, A], state -> prediction and new state.

        `observed`, `picture` and `true_pose` are for models that use them; this one does not.
        """
        features, state = self.recur(self.compute_embeddings(tokens), self.compute_film(actions), state)
        return Prediction(features), state

    def logits(
        self, prediction: Prediction, cells: Tensor | None = None, trust: Tensor | float = 0.0
    ) -> Tensor:
        """Logits over the next frame's codes [B, V, H, W]; of `cells` [B, n] alone: [B, n, V].

        `trust` is for models with a prior; this one has none.
        """
        logits = self.head(prediction.features)
        if cells is None:
            return logits
        return logits.flatten(2).gather(2, cells[:, None].expand(-1, logits.shape[1], -1)).mT

    def condition_on_tokens(self, prediction: Prediction, tokens: Tensor, given: Tensor) -> Prediction:
        """Returns the prediction unchanged: this model has no block for masked parallel decoding."""
        return prediction

    def step(self, tokens: Tensor, actions: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame: tokens [B, H, W], actions [B, A], state or None -> logits [B, V, H, W], new state."""
        if state is None:
            state = self.init_state(len(tokens), tokens.device)
        prediction, state = self.predict(tokens, actions, state)
        return self.logits(prediction), state

    def forward(self, tokens: Tensor, actions: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Teacher-forced: tokens [B, T, H, W], actions [B, T, A] -> logits [B, T, V, H, W], last state."""
        if state is None:
            state = self.init_state(len(tokens), tokens.device)
        embedded, film = self.compute_embeddings(tokens), self.compute_film(actions)
        logits = []
        for t in range(tokens.shape[1]):
            features, state = self.recur(embedded[:, t], film[:, t], state)
            logits.append(self.head(features))
        return torch.stack(logits, 1), state
