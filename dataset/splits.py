"""Which clips are held out for validation: whole worlds where there are enough, else clips, else the end of
the only clip.

The same rule holds for token files, for the tokenizer's pictures and for the depth network's frames.
"""

from collections import Counter
from collections.abc import Mapping

from dataset.token_files import HeldOut, split_of, split_position

WORLD = "world_"  # begins the group of a clip whose metadata names its world
GAP_FRAMES = 64  # left out between the two parts of a single clip: they would show the same view
LEAST_FRAMES = 64  # of a clip whose end can be held out


def assign_splits(groups: Mapping[str, str], val_fraction: float) -> tuple[dict[str, str], HeldOut]:
    """The split, "train" or "val", of each clip, and what is held out.

    `groups` maps the names of all clips to their groups: WORLD + seed, or any name where the world is
    unknown. A group is held out by a hash of its name. Where this leaves one of the splits empty, although
    `val_fraction` is neither 0 nor 1, the smallest worlds are held out instead, or clips if there is one
    world only; the order is that of the hash, so the result is the same on every machine.
    """
    splits = {name: split_of(group, val_fraction) for name, group in groups.items()}
    known = any(group.startswith(WORLD) for group in groups.values())
    held_out = HeldOut.WORLDS if known else HeldOut.CLIPS
    if len(set(splits.values())) == 2:
        return splits, held_out
    if val_fraction == 1 and groups:
        return dict.fromkeys(groups, "val"), held_out
    if val_fraction == 0 or len(groups) < 2:
        return dict.fromkeys(groups, "train"), HeldOut.NOTHING
    units = {name: group if group.startswith(WORLD) else name for name, group in groups.items()}
    worlds = known and len(set(units.values())) > 1
    if not worlds:
        units = {name: name for name in groups}
    sizes = Counter(units.values())
    order = sorted(sizes, key=lambda unit: (sizes[unit], split_position(unit)))
    held = set(order[: min(len(order) - 1, max(1, round(val_fraction * len(order))))])
    splits = {name: "val" if unit in held else "train" for name, unit in units.items()}
    return splits, HeldOut.WORLDS if worlds else HeldOut.CLIPS


def cut_of(frames: int, val_fraction: float) -> list[int]:
    """[a, b] for the only clip, of `frames` frames: those before a are trained on, those from b on are held
    out, and those between are in neither. [] where nothing is to be held out or the clip is too short."""
    if frames < LEAST_FRAMES or val_fraction in (0, 1):
        return []
    held = min(max(round(val_fraction * frames), LEAST_FRAMES), frames // 4)
    start = frames - held
    return [start - min(GAP_FRAMES, frames // 8), start]


def explain(held_out: HeldOut, splits: Counter, val_fraction: float) -> str:
    """What is held out, in words. `splits` counts the clips of each split."""
    total = splits["train"] + splits["val"]
    match held_out:
        case HeldOut.WORLDS:
            return f"held out: {splits['val']} of {total} clips, whole worlds"
        case HeldOut.CLIPS:
            return (
                f"held out: {splits['val']} of {total} clips, which may show the same ground as the others: "
                "validation is then better than in a new world; record more worlds for a fair one"
            )
        case HeldOut.END:
            return (
                "held out: the end of the only clip, after a gap: validation is then better than in a new "
                "world; record more worlds for a fair one"
            )
    reason = "as asked by --val_fraction 0" if val_fraction == 0 else "the only clip is too short to be cut"
    return f"held out: nothing, {reason}; training then goes without validation"
