"""The manifests in one folder of token files: what is finished there, with which settings, and joining
shards.
"""

from dataclasses import replace
from pathlib import Path

from dataset.recordings import Clip, ClipError, has_depth
from dataset.token_files import EXTRAS, MANIFEST, ClipEntry, DataError, Manifest, read_token_file

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


def shard_manifest(index: int, shards: int) -> str:
    """File name of the manifest of shard `index` (1 to `shards`)."""
    return MANIFEST if shards == 1 else f"manifest-shard-{index}-of-{shards}.json"


def load_manifests(
    out_dir: Path, settings: Manifest
) -> tuple[dict[str, ClipEntry], dict[str, dict], Manifest]:
    """Reads all manifests in `out_dir`: entries and skipped clips by name; the newest manifest counts.

    Also returns `settings` with the camera unit of these manifests, 0 if there is none. Raises DataError if
    one of them has other settings.
    """
    entries: dict[str, ClipEntry] = {}
    skipped: dict[str, dict] = {}
    paths = [out_dir / MANIFEST, *out_dir.glob(shard_manifest("*", "*"))]
    unit = None
    for path in sorted((p for p in paths if p.is_file()), key=lambda p: p.stat().st_mtime_ns):
        manifest = Manifest.load(out_dir, path.name)
        pairs = [(name, getattr(manifest, name), getattr(settings, name)) for name in SETTINGS]
        if None not in (manifest.depth_scale, settings.depth_scale):
            pairs.append(("depth_scale", manifest.depth_scale, settings.depth_scale))
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
        settings = replace(settings, depth_scale=settings.depth_scale or manifest.depth_scale)
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
        if joined == written:
            return joined
        joined.save(out_dir)
        written = joined


def is_finished(entry: ClipEntry, out_dir: Path, settings: Manifest, with_depth: bool) -> bool:
    """Whether the token file of `entry` exists, is readable, has the right size, and depth if it should."""
    if not (out_dir / entry.file).is_file():
        return False
    try:
        content = read_token_file(out_dir / entry.file, EXTRAS if with_depth else ())
    except DataError:
        return False
    if with_depth and "depth" not in content:
        return False
    return list(content["tokens"].shape) == [entry.frames, *settings.latent_size]


def is_done(clip: Clip, entry: ClipEntry | None, out_dir: Path, settings: Manifest) -> bool:
    """Whether a manifest lists the clip and its token file is finished.

    Raises ClipError if the name belongs to another video, whose token file would be overwritten.
    """
    if entry is None or not is_finished(entry, out_dir, settings, has_depth(clip)):
        return False
    listed = out_dir / entry.video
    if listed.exists() and clip.video.exists() and not listed.samefile(clip.video):
        raise ClipError("name taken", f"{entry.file} was made from {listed}; use another --out_dir")
    return True
