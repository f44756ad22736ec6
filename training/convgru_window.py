"""The loss of a training window for the ConvGRU + FiLM baseline."""

import torch
from torch import Tensor

from model_convGru import ConvGRUWorldModel
from rollout.sampling import sample_from_logits
from training.window_parts import InputConfig, StepLoss, WindowResult, corrupt_tokens


def convgru_window_loss(
    model: ConvGRUWorldModel, step_loss: StepLoss, tokens: Tensor, actions: Tensor, inputs: InputConfig
) -> WindowResult:
    """Runs a window through the model: tokens [B, T+1, H, W], actions [B, T, 5].

    In each of the last `ar_len` steps a sample is given what the model sampled for that frame, with
    probability 1 - `teacher_prob`, else the recorded tokens.
    """
    B, T = actions.shape[:2]
    given, _ = corrupt_tokens(tokens[:, :-1], model.config.codebook_size, inputs.token_noise)
    embedded = model.compute_embeddings(given)  # [B, T, C, H, W]
    if inputs.latent_noise:
        embedded = embedded + inputs.latent_noise * torch.randn_like(embedded)
    film = model.compute_film(actions)
    state = model.init_state(B, tokens.device)
    steps, self_fed = [], []
    log_probs = logits = None
    for t in range(T):
        x = embedded[:, t]
        own = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        if t >= T - inputs.ar_len and logits is not None:
            own = torch.rand(B, device=tokens.device) >= inputs.teacher_prob
            # Sampled tokens carry no gradient; only the self-fed samples are embedded again.
            if own.any():
                sampled = sample_from_logits(logits.detach()[own], inputs.sampling)
                x = x.index_put((own.nonzero()[:, 0],), model.compute_embeddings(sampled).to(x.dtype))
        features, state = model.recur(x, film[:, t], state)
        logits = model.head(features)
        terms, log_probs = step_loss(logits, tokens[:, t + 1], log_probs)
        steps.append(terms)
        self_fed.append(own)
    return WindowResult.of_steps(steps, self_fed, log_probs, film.detach())
