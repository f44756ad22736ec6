"""A session on the tiny world that notes its actions, and a clock for tests."""

from pathlib import Path

import live_inference
from playing.session import Session
from rollout.context import load_recording, load_world
from rollout.rollout import Rollout

FPS, SENS = 16.0, 0.15


def make_session(tiny, out: Path, names: tuple[str, ...] = ("clip.npz", "other.npz")) -> Session:
    """A session of the tiny world with a start place per name, all of the same recording.

    `session.actions_given` notes the actions that reach the model.
    """
    words = [*tiny.flags, "--context_npz", str(tiny.tokens)]
    flags = live_inference.parse_config(words).rollout
    world = load_world(flags.checkpoint, flags.vqvae_ckpt, flags.device, flags.precision)
    recording = load_recording(tiny.tokens, world)
    start_places = [
        type(recording)(name, recording.tokens, recording.actions, recording.pose) for name in names
    ]
    rollout = Rollout(world.model, flags.sampling, flags.seed, world.dtype)
    session = Session(world, rollout, start_places, flags.context_frames, out)
    session.actions_given = []
    predict = session.rollout.predict

    def spy(actions):
        session.actions_given.append(actions[0].tolist())
        return predict(actions)

    session.rollout.predict = spy
    return session


class FakeTime:
    """A clock that advances only by sleeping."""

    def __init__(self):
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
