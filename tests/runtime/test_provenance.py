"""runtime/provenance.py: what is written beside measurements names no private folder."""

import json

from runtime.provenance import ROOT, command_line, display_path, write_json


def test_commands_name_no_private_folder(tmp_path):
    words = command_line(
        ROOT / "benchmark.py", ["train", str(tmp_path / "x y.json"), f"--out={tmp_path}/b.json"]
    )
    assert words == "python benchmark.py train 'x y.json' --out=b.json"


def test_paths_are_relative_to_the_repository_or_bare_names(tmp_path):
    assert display_path(ROOT / "checkpoints" / "world.pt") == "checkpoints/world.pt"
    assert display_path(tmp_path / "world.pt") == "world.pt"


def test_json_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"metrics": {"x": 1.5}})
    assert json.loads(path.read_text()) == {"metrics": {"x": 1.5}}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
