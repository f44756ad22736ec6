"""Depth files: the code of distances, the conversion of a depth buffer, and files that are refused."""

import numpy as np
import pytest

from dataset.recordings import (
    ClipError,
    ClipWriter,
    clip_paths,
    depth_path,
    is_complete,
    read_depth_file,
    remove_unfinished,
)
from dataset.surroundings import (
    BOX,
    FARTHEST,
    FREE,
    NEAREST,
    SKY,
    Surroundings,
    SurroundingsError,
    centre_of_block,
    decode_inverse_ray_distance,
    encode_inverse_ray_distance,
    inverse_axial_depth,
    read_surroundings,
    write_surroundings,
)
from geometry import camera

K = 3


def surroundings(frames: int = K) -> Surroundings:
    rng = np.random.default_rng(0)
    return Surroundings(
        rng.integers(0, 256, (frames, 4, 6), np.uint8),
        np.full((frames, *BOX), FREE, np.uint8),
        rng.integers(-20000, 20000, (frames, 3)).astype(np.int32),
    )


# ------------------------------------------------------------ the code


def test_distances_are_decoded_within_half_a_step():
    distance = np.geomspace(NEAREST, 190, 1000)
    codes = encode_inverse_ray_distance(1 / distance)
    assert codes.dtype == np.uint8 and (np.diff(codes.astype(int)) <= 0).all()
    back = decode_inverse_ray_distance(codes)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back * distance, 1, atol=0.015)


def test_codes_follow_the_documented_formula():
    codes = np.arange(1, 256)
    stated = np.exp(codes / 255 * (np.log(8) - np.log(1 / 200)) + np.log(1 / 200))
    np.testing.assert_allclose(decode_inverse_ray_distance(codes.astype(np.uint8)), stated, rtol=1e-5)
    assert (encode_inverse_ray_distance(stated) == codes).all()


def test_codes_at_both_ends_of_the_range():
    far = np.array([0.0, 1 / 2000, 1 / FARTHEST])
    assert (encode_inverse_ray_distance(far) == SKY).all()
    assert decode_inverse_ray_distance(np.array([SKY], np.uint8)) == 0
    assert (encode_inverse_ray_distance(np.array([8.0, 9.0, 1e6])) == 255).all()


# ------------------------------------------------------------ the depth buffer


def buffer_of(axial: np.ndarray, near: float, far: float) -> np.ndarray:
    """Axial depths -> OpenGL's depth buffer for a perspective projection."""
    clip = (far + near) / (far - near) - 2 * far * near / (far - near) / axial
    return (clip + 1) / 2


def test_axial_depths_are_computed_from_a_depth_buffer():
    axial = np.geomspace(0.11, 1500, 200)
    found = 1 / inverse_axial_depth(buffer_of(axial, 0.1, 2000.0), 0.1, 2000.0)
    np.testing.assert_allclose(found, axial, rtol=1e-6)


def test_a_wall_has_constant_axial_depth_and_larger_ray_distances_off_axis():
    rays = camera.rays(36, 64, 70.0).numpy()
    axial = inverse_axial_depth(buffer_of(np.full((36, 64, 4), 5.0), 0.1, 2000.0), 0.1, 2000.0)
    distance = 1 / (centre_of_block(axial) * rays[..., 2])
    points = rays * distance[..., None]
    np.testing.assert_allclose(points[..., 2], 5, rtol=1e-5)
    assert distance.min() == pytest.approx(5, abs=0.01) and distance.max() > 7


def test_block_centres_on_a_slanted_surface_and_at_an_edge():
    slanted = np.array([[0.50, 0.51, 0.52, 0.53], [0.52, 0.50, 0.53, 0.51]])
    np.testing.assert_allclose(centre_of_block(slanted), 0.515)
    edges = np.array([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.1, 0.5], [0.1, 0.5, 0.5, 0.5], [0.5, 0.1, 0.5, 0.1]])
    np.testing.assert_allclose(centre_of_block(edges), [0.5, 0.1, 0.5, 0.5])


# ------------------------------------------------------------ files


def test_depth_file_round_trip(tmp_path):
    path, written = tmp_path / "depth" / "a.npz", surroundings()
    write_surroundings(path, written)
    read = read_surroundings(path, K)
    for name, array in written.arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], array)
    write_surroundings(path, Surroundings(written.log_inverse))
    assert read_surroundings(path).nodes is None


@pytest.mark.parametrize(
    "change",
    [
        {"log_inverse": np.zeros((K, 4, 6), np.float32)},
        {"log_inverse": np.zeros((K, 4), np.uint8)},
        {"log_inverse": np.uint8(3)},
        {"log_inverse": None},
        {"nodes": np.zeros((K, 5, 6, 5), np.uint8)},
        {"nodes": np.zeros((K + 1, *BOX), np.uint8)},
        {"nodes": None},
        {"origin": None},
        {"origin": np.zeros((K, 3), np.float32)},
    ],
)
def test_a_depth_file_with_wrong_shapes_or_types_is_refused(tmp_path, change):
    arrays = {**surroundings().arrays(), **change}
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(
        SurroundingsError, match=r"a\.npz: expected log_inverse.*found.*record the clip again"
    ):
        read_surroundings(path)


def test_missing_damaged_and_too_short_depth_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(SurroundingsError, match=r"a\.npz: no such depth file"):
        read_surroundings(path)
    path.write_bytes(b"no zip")
    with pytest.raises(SurroundingsError, match=r"a\.npz: cannot be read"):
        read_surroundings(path)
    write_surroundings(path, surroundings())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SurroundingsError, match=r"a\.npz: cannot be read"):
        read_surroundings(path)
    write_surroundings(path, surroundings())
    with pytest.raises(SurroundingsError, match=r"a\.npz: 3 frames, its clip has 4"):
        read_surroundings(path, 4)


def test_the_metadata_are_written_last(tmp_path, monkeypatch):
    from dataset import recordings

    placed = []
    replace = recordings.os.replace
    monkeypatch.setattr(recordings.os, "replace", lambda a, b: (placed.append(b.suffix), replace(a, b)))
    with ClipWriter(tmp_path, "clip", 16.0) as clip:
        for _ in range(K):
            clip.write(np.zeros((16, 24, 3), np.uint8))
        clip.finish({"actions": {str(k): {} for k in range(K)}}, surroundings())
    assert placed == [".mp4", ".npz", ".json"]
    assert is_complete(tmp_path, "clip")
    video = clip_paths(tmp_path, "clip")[1]
    assert read_depth_file(video, K).nodes is not None
    with pytest.raises(ClipError, match=r"broken depth: .*clip\.npz: 3 frames, its clip has 9"):
        read_depth_file(video, 9)


def test_a_clip_without_depth_reads_as_none_and_unfinished_files_are_removed(tmp_path):
    assert read_depth_file(tmp_path / "video" / "a.mp4") is None
    assert depth_path(tmp_path / "a.mp4") == tmp_path / "depth" / "a.npz"
    part = tmp_path / "depth" / ".a.part.npz"
    write_surroundings(part, surroundings())
    remove_unfinished(tmp_path)
    assert not part.exists()
