"""How much an evaluation measures: contexts, horizons and numbers of windows."""

from dataclasses import dataclass, replace

BATCH = 16  # windows that go through the world model together
COUNTS = (
    "windows", "teacher_forced_frames", "start_windows", "still_windows", "still_starts", "memory_windows",
    "look_aways", "long_rollouts", "walk_starts", "depth_windows",
    "recovery_starts",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The size of an evaluation. The defaults are those of a full run."""

    contexts: tuple[int, ...] = (1, 6, 16)  # recorded frames given before a rollout starts
    horizons: tuple[int, ...] = (1, 4, 8, 16, 20, 32, 64)  # frames into the rollout that are reported
    windows: int = 64  # recorded windows that are rolled out under their own actions
    teacher_forced_frames: int = 12_000  # at most, over all clips
    start_windows: int = 64  # from which each constant command is given
    still_windows: int = 64  # recorded windows without an action
    still_starts: int = 16  # from which the player stands still for long
    still_seconds: int = 30
    memory_windows: int = 48  # from which the camera turns away and back
    look_aways: int = 16  # recorded ones, per angle
    long_rollouts: int = 16
    long_frames: int = 1024  # of each long rollout
    walk_starts: int = 30  # from which a minute is walked
    walk_seconds: int = 60
    recovery_starts: int = 8  # from which is walked with the recovery of play
    recovery_seconds: int = 30
    motion_paths: int = 40  # straight ones that end at an obstacle, and as many free ones
    depth_windows: int = 240  # recorded frames that are warped by their depth

    @property
    def span(self) -> int:
        """Frames of a window: the longest context and the longest horizon."""
        return max(self.contexts) + max(self.horizons)

    @property
    def main_context(self) -> int:
        """The context of everything measured with a single context: 6 if it is among `contexts`, else the
        longest."""
        return 6 if 6 in self.contexts else max(self.contexts)

    def scaled(self, share: float) -> "Plan":
        """A plan with a share (0..1) of the windows and starts, at least one of each. Frames, seconds and
        horizons stay, so the numbers mean the same and their intervals are wider."""
        counts = {name: max(1, round(getattr(self, name) * share)) for name in COUNTS}
        return replace(self, **counts)


FULL = Plan()
QUICK = Plan(
    windows=4, teacher_forced_frames=320, start_windows=2, still_windows=4, still_starts=2, still_seconds=4,
    memory_windows=2, look_aways=1, long_rollouts=2, long_frames=192, walk_starts=2, walk_seconds=2,
    recovery_starts=1, recovery_seconds=2,
    motion_paths=4, depth_windows=24,
)  # fmt: skip
