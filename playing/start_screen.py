"""The start screen: the start places as small pictures that slowly turn, one of which the player chooses.

Independent of any display. Each place is turned by the world model once, one step of one place at a time, so
that it costs no more than play; from then on its pictures are shown back and forth.
"""

from pathlib import Path

import numpy as np
import torch

from dataset.actions import encode
from playing.session import Session
from rollout.context import load_recording, prime
from rollout.rollout import Rollout
from runtime.errors import UserError

TURN_PICTURES = 25  # of each place, the one at the start among them
TURN_DEGREES = 1.5  # between two of them
TURN_RATE = 8.0  # pictures a second
MAX_PLACES = 40
DROP_HINT = "drop a photo or a clip here"
KEY_HINT = "click or 1-9: start there    N, arrows: select    any other key: start    Esc: quit"


class Turn:
    """A start place turning to the right: its pictures [H, W, 3] uint8, as far as they are generated."""

    def __init__(self, session: Session, index: int):
        """Generates the first picture, that of the place at its start. One frame primes the model: it is
        enough to turn, and takes no time."""
        self.degrees_per_unit = session.world.degrees_per_unit
        self.rollout = Rollout(session.world.model, session.rollout.sampling, dtype=session.world.dtype)
        prime(self.rollout, [session.start_places[index].first(session.context_frames).last(1)])
        self.pictures = [self.rollout.pictures()[0].numpy()]
        self.complete_at: float | None = None  # seconds at which the last picture was shown first

    def advance(self) -> bool:
        """Generates the next picture; returns False if there are all."""
        if len(self.pictures) == TURN_PICTURES:
            return False
        action = encode(TURN_DEGREES, 0.0, 0, 0, 0, degrees_per_unit=self.degrees_per_unit)
        self.rollout.step(torch.from_numpy(action)[None])
        self.pictures.append(self.rollout.pictures()[0].numpy())
        if len(self.pictures) == TURN_PICTURES:
            self.rollout = None  # its memory
        return True

    def picture(self, seconds: float) -> np.ndarray:
        """What to show at a time: the newest picture, and once there are all, them back and forth."""
        if len(self.pictures) < TURN_PICTURES:
            return self.pictures[-1]
        if self.complete_at is None:
            self.complete_at = seconds
        number = TURN_PICTURES - 1 + int((seconds - self.complete_at) * TURN_RATE)
        return self.pictures[back_and_forth(number, TURN_PICTURES)]


def back_and_forth(number: int, count: int) -> int:
    """The number 0, 1, 2, ... -> 0, 1, ..., count-1, count-2, ..., 0, 1, ..."""
    period = max(1, 2 * (count - 1))
    return min(number % period, period - number % period)


class StartScreen:
    """The start places of a session, and which of them is selected."""

    def __init__(self, session: Session, is_open: bool):
        self.session, self.is_open = session, is_open
        self.began = not is_open  # a place has been played
        self.selected = session.start_index
        self.turns: list[Turn] = []  # of the first of the places; the others follow

    @property
    def names(self) -> list[str]:
        """The names of the places."""
        return [Path(recording.name).stem for recording in self.session.start_places]

    def advance(self) -> int | None:
        """Generates a picture of the place with the fewest -> its number; None if there are all."""
        if len(self.turns) < len(self.session.start_places):
            self.turns.append(Turn(self.session, len(self.turns)))
            return len(self.turns) - 1
        number = min(range(len(self.turns)), key=lambda n: len(self.turns[n].pictures))
        return number if self.turns[number].advance() else None

    def select(self, index: int) -> None:
        """Selects a place; numbers beyond the last one begin anew."""
        self.selected = index % len(self.session.start_places)

    def open(self) -> None:
        """Shows the screen; the world waits."""
        self.is_open, self.selected = True, self.session.start_index

    def close(self) -> None:
        """Goes on where the player was."""
        self.is_open, self.began = False, True

    def choose(self, index: int) -> str:
        """Starts from a place -> the message for the player. Nothing happens if there is none of that
        number."""
        if index >= len(self.session.start_places):
            return f"there are {len(self.session.start_places)} start places"
        self.close()
        return self.session.go_to(index)

    def add(self, path: Path, frames: int | None = None) -> str:
        """Starts from a picture, a clip or a token file, as a further place -> the message for the player.

        Of a clip at most `frames` frames are read. A file that cannot be read is named in the message.
        """
        if len(self.session.start_places) >= MAX_PLACES:
            return f"there are {MAX_PLACES} start places already; start anew to drop more"
        try:
            recording = load_recording(path, self.session.world, frames)
        except (UserError, OSError) as error:
            return str(error)
        self.session.start_places.append(recording)
        return self.choose(len(self.session.start_places) - 1)
