"""The manifests in one folder of token files: what is finished there, with which settings, and joining
shards.
"""

from dataclasses import replace
from pathlib import Path

from dataset.recordings import Clip, ClipError, has_depth
from dataset.splits import HeldOut, assign_splits, cut_of
from dataset.token_files import (
    EXTRAS,
    MANIFEST,
    PREDICTED,
    RECORDED,
    ClipEntry,
    DataError,
    Manifest,
    depth_source,
    read_token_file,
)

# Fields that must agree between a run and the manifests already in its folder.
SETTINGS = (
    "fps",
    "picture_size",
    "latent_size",
    "codebook_size",
    "tokenizer",
    "vertical_fov_degrees",
    "resize",
    "source",
    "pool_keys",
    "trim_seconds",
    "precision",
    "val_fraction",
)
# Fields that must agree where both are set.
DEPTH_SETTINGS = ("depth_scale", "depth_network")


def shard_manifest(index: int, shards: int) -> str:
    """File name of the manifest of shard `index` (1 to `shards`)."""
    return MANIFEST if shards == 1 else f"manifest-shard-{index}-of-{shards}.json"


def load_manifests(
    out_dir: Path, settings: Manifest
) -> tuple[dict[str, ClipEntry], dict[str, dict], Manifest]:
    """Reads all manifests in `out_dir`: entries and skipped clips by name; the newest manifest counts.

    Also returns `settings` with the camera unit of these manifests, 0 if there is none, and with their
    DEPTH_SETTINGS where it has none. Raises DataError if one of them has other settings.
    """
    entries: dict[str, ClipEntry] = {}
    skipped: dict[str, dict] = {}
    paths = [out_dir / MANIFEST, *out_dir.glob(shard_manifest("*", "*"))]
    unit = None
    for path in sorted((p for p in paths if p.is_file()), key=lambda p: p.stat().st_mtime_ns):
        manifest = Manifest.load(out_dir, path.name)
        depth = {name: (getattr(manifest, name), getattr(settings, name)) for name in DEPTH_SETTINGS}
        pairs = [(name, getattr(manifest, name), getattr(settings, name)) for name in SETTINGS]
        pairs += [(name, *values) for name, values in depth.items() if all(values)]
        if unit is not None:
            pairs.append(("camera_degrees_per_unit", manifest.camera_degrees_per_unit, unit))
        unit = manifest.camera_degrees_per_unit
        for name, old, new in pairs:
            if old != new:
                raise DataError(
                    f"{path}: the token files here were made with {name} = {old}, this run has {new}; "
                    f"use the same settings, choose another --out_dir, or delete {out_dir} to encode again"
                )
        for clip in manifest.clips:
            entries[clip.name] = clip
            skipped.pop(clip.name, None)
        skipped.update({s["name"]: s for s in manifest.skipped})
        settings = replace(settings, **{name: new or old for name, (old, new) in depth.items()})
    return entries, skipped, replace(settings, camera_degrees_per_unit=unit or 0.0)


def join_manifests(out_dir: Path, settings: Manifest) -> Manifest:
    """Joins all manifests in `out_dir` into manifest.json; entries without a token file are left out.

    Two shards may end at the same time. Each reads again after writing, so the last to write has seen all.
    """
    written = None
    while True:
        entries, skipped, joined = load_manifests(out_dir, settings)
        joined.clips = [e for _, e in sorted(entries.items()) if (out_dir / e.file).is_file()]
        joined.skipped = [s for _, s in sorted(skipped.items())]
        joined = hold_out(joined)
        if joined == written:
            return joined
        joined.save(out_dir)
        written = joined


def hold_out(manifest: Manifest) -> Manifest:
    """The manifest with the splits of all its clips by `splits.assign_splits`.

    Entries of older manifests, which name no group, keep their splits.
    """
    fraction = manifest.val_fraction
    groups = {clip.name: clip.group for clip in manifest.clips}
    if not all(groups.values()):
        return manifest
    splits, held_out = assign_splits(groups, fraction)
    clips = [replace(clip, split=splits[clip.name], cut=[]) for clip in manifest.clips]
    if len(clips) == 1 and clips[0].split == "train":
        clips[0].cut = cut_of(clips[0].frames, fraction)
        held_out = HeldOut.END if clips[0].cut else HeldOut.NOTHING
    return replace(manifest, clips=clips, held_out=held_out.value)


def wanted_depth(clip: Clip, depth: str) -> str:
    """Where the depth of a clip's token file should come from, RECORDED, PREDICTED or "" for no depth.

    `depth` is "none"; RECORDED, for recorded depth only; or PREDICTED, for the clips without recorded depth.
    """
    if depth == "none":
        return ""
    if has_depth(clip):
        return RECORDED
    return PREDICTED if depth == PREDICTED else ""


def is_finished(entry: ClipEntry, out_dir: Path, settings: Manifest, wanted: str) -> bool:
    """Whether the token file of `entry` exists, is readable, has the right size, and its depth if `wanted`.

    `wanted` is of `wanted_depth`. Recorded depth will do where predicted depth is wanted. Depth that is not
    wanted does no harm.
    """
    if not (out_dir / entry.file).is_file():
        return False
    try:
        content = read_token_file(
            out_dir / entry.file, EXTRAS if wanted else (), settings.codebook_size, entry.frames
        )
    except DataError:
        return False
    if wanted and depth_source(out_dir / entry.file) not in (wanted, RECORDED):
        return False
    return list(content["tokens"].shape) == [entry.frames, *settings.latent_size]


def is_done(clip: Clip, entry: ClipEntry | None, out_dir: Path, settings: Manifest, wanted: str) -> bool:
    """Whether a manifest lists the clip and its token file is finished, with the depth `wanted`.

    Raises ClipError if the name belongs to another video, whose token file would be overwritten.
    """
    if entry is None or not is_finished(entry, out_dir, settings, wanted):
        return False
    listed = out_dir / entry.video
    if listed.exists() and clip.video.exists() and not listed.samefile(clip.video):
        raise ClipError("name taken", f"{entry.file} was made from {listed}; use another --out_dir")
    return True
