"""An adversarial loss on the pictures of sampled tokens.

Cross-entropy judges each cell alone, and play samples each cell alone: where several textures are likely, a
frame becomes a mixture of all of them, and the next keyframe starts from it. A discriminator judges the
decoded picture of such a sample, with gradients through the hard samples (straight-through Gumbel-softmax,
arXiv 1611.01144), so the cells learn to agree.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.keyframes import VISIBLE
from metrics.perceptual import EffNetDistance
from model_geometry import GeometryWorldModel, Prediction
from rollout.sampling import PLAY
from training.pairs import has_no_target
from vq_vae.discriminator import LEVELS, build_discriminator, update_discriminator
from vq_vae.tokenizer import Tokenizer

LEARNING_RATE = 3e-4  # of the discriminator
WARMUP = 100  # updates of the discriminator before the world model learns from it


@dataclass
class Sampled:
    """Pictures [n, 3, Hp, Wp] of sampled tokens, and their features."""

    pictures: Tensor
    features: list[Tensor]


class AdversarialLoss:
    """The discriminator of decoded pictures, its optimizer, and both losses. Each process has its own."""

    def __init__(self, tokenizer: Tokenizer, batch: int):
        """`batch`: samples of each step that it is computed on. Raises SettingError for small pictures."""
        self.tokenizer, self.batch = tokenizer, batch
        self.network = EffNetDistance().to(tokenizer.device)
        self.discriminator = build_discriminator(self.network, tokenizer.config)
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.99), weight_decay=0.0
        )
        self.updates = 0
        self._sampled: Sampled | None = None

    def loss(self, model: GeometryWorldModel, prediction: Prediction) -> Tensor:
        """How far the pictures of a prediction of n samples are from being taken for recorded ones: [n].

        `update` then trains the discriminator on the same pictures. 0 in the first WARMUP steps.
        """
        learns = self.updates >= WARMUP
        with torch.set_grad_enabled(learns):
            pictures = self.tokenizer.decode_vectors(sampled_vectors(model, prediction))
            self._sampled = Sampled(pictures, self.network.features(pictures, LEVELS))
            if not learns:
                return torch.zeros(len(pictures), device=pictures.device)
            self.discriminator.requires_grad_(False)
            return -self.discriminator(pictures, self._sampled.features).float().mean(1)

    def update(self, target: Tensor) -> float:
        """A step of the discriminator, after the world model's backward pass; target [B, H, W] as in
        `pair_loss`, of which up to `batch` recorded ones are taken. Returns its loss; one that is not finite
        changes nothing."""
        target = target[~has_no_target(target)][: self.batch]
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            recorded = self.tokenizer.decode(target)
            features = self.network.features(recorded, LEVELS)
        scores = self.discriminator(recorded, features)
        sampled, self._sampled = self._sampled, None
        others = self.discriminator(sampled.pictures.detach(), [f.detach() for f in sampled.features])
        loss = update_discriminator(self.optimizer, scores, others)
        self.updates += int(loss.isfinite())
        return float(loss)

    def content(self) -> dict:
        """What a checkpoint holds of it."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
            "discriminator_updates": self.updates,
        }

    def restore(self, content: dict) -> None:
        """Continues from `content`; from the start if the run had no discriminator so far."""
        if "discriminator" in content:
            self.discriminator.load_state_dict(content["discriminator"])
            self.optimizer.load_state_dict(content["discriminator_optimizer"])
            self.updates = int(content["discriminator_updates"])


def sampled_vectors(model: GeometryWorldModel, prediction: Prediction) -> Tensor:
    """Code vectors [B, D, H, W] of a frame as play samples it, but for top-p: kept cells take the likeliest
    code, the others are sampled, with the gradient of the Gumbel-softmax."""
    kept = (prediction.visible_mask > VISIBLE) & ~prediction.refined
    logits = model.logits(prediction, trust=PLAY.trust * kept).movedim(1, -1)  # [B, H, W, V]
    codebook = model.tokenizer.codebook
    vectors = codebook[logits.argmax(-1)]
    noise = -torch.empty_like(logits[~kept]).exponential_().log()
    scores = logits[~kept] + noise  # [N, V]
    hard = codebook[scores.argmax(-1)]
    soft = F.softmax(scores, -1) @ codebook
    vectors[~kept] = (hard - soft).detach() + soft
    return vectors.movedim(-1, 1)
