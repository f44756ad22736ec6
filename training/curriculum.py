"""The curriculum of a run: window length, and how much of each window is self-fed.

Self-fed steps are given the model's own samples instead of the recorded tokens (scheduled sampling, Bengio et
al., arXiv 1506.03099).
"""

import math

from rollout.sampling import SamplingConfig
from runtime.config import SettingError
from training.train_config import TrainConfig
from training.window_parts import InputConfig


class Curriculum:
    """What the model is given at each training step.

    `ar_len` is the number of last steps of a window that may be self-fed. With AR_GROWTH=ramp it grows with
    the training step. With AR_GROWTH=rollout it grows by AR_STEP whenever the validation rollouts improve.
    """

    def __init__(self, config: TrainConfig):
        """Raises SettingError for an unknown AR_GROWTH."""
        if config.ar_growth not in ("rollout", "ramp"):
            raise SettingError(f"AR_GROWTH={config.ar_growth}: must be rollout or ramp")
        self.config = config
        self.best_rollout = -math.inf  # dB: best PSNR of the validation rollouts so far
        self.grown = min(config.ar_step, config.ar_len_max)  # AR_GROWTH=rollout: `ar_len` so far

    def sequence_length(self, step: int) -> int:
        """Transitions in a window: SEQ_LEN, one more every SEQ_LEN_GROW_STEPS, at most SEQ_LEN_MAX."""
        c = self.config
        return min(max(c.seq_len, c.seq_len_max), c.seq_len + step // c.seq_len_grow_steps)

    def self_fed_length(self, step: int, seq_len: int) -> int:
        """`ar_len` at a training step; at most seq_len - 1: the first step is given recorded tokens."""
        c = self.config
        if step < c.ar_start_step:
            return 0
        if c.ar_growth == "rollout":
            return min(self.grown, seq_len - 1)
        ramp = (step - c.ar_start_step) / max(1, c.ar_ramp_steps)
        return min(int(c.ar_len_max * min(1.0, ramp)), seq_len - 1)

    def teacher_probability(self, step: int) -> float:
        """Probability that a step within the last `ar_len` is given the recorded tokens after all.

        AR_GROWTH=rollout: SS_MIN_TEACHER_PROB. AR_GROWTH=ramp: an inverse sigmoid of the training step,
        between SS_MAX_TEACHER_PROB and SS_MIN_TEACHER_PROB.
        """
        c = self.config
        if c.ar_growth == "rollout":
            return c.ss_min_teacher_prob
        p = 1 / (1 + math.exp(min(50.0, (step - c.ss_midpoint_step) / c.ss_steepness)))
        return min(c.ss_max_teacher_prob, max(c.ss_min_teacher_prob, p))

    def inputs(self, step: int, seq_len: int) -> InputConfig:
        """What the model is given at a training step, in windows of `seq_len` transitions."""
        c = self.config
        return InputConfig(
            ar_len=self.self_fed_length(step, seq_len),
            teacher_prob=self.teacher_probability(step),
            sampling=SamplingConfig(greedy=c.self_fed_greedy, temperature=c.self_fed_temperature),
            token_noise=c.token_noise,
            latent_noise=c.latent_noise,
            similar_share=c.similar_codes,
            masked_decoding=c.masked_decoding,
        )

    def validated(self, rollout_psnr: float) -> None:
        """Takes the PSNR in dB of new validation rollouts (NaN: there were none); an improvement extends
        `ar_len`."""
        if rollout_psnr > self.best_rollout:
            self.best_rollout = rollout_psnr
            self.grown = min(self.grown + self.config.ar_step, self.config.ar_len_max)

    def content(self) -> dict[str, float]:
        """What a checkpoint holds of it."""
        return {"best_rollout": self.best_rollout, "grown": self.grown}

    def restore(self, content: dict) -> None:
        """Continues from the content of a checkpoint."""
        self.best_rollout, self.grown = float(content["best_rollout"]), int(content["grown"])
