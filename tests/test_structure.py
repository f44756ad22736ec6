"""The layout: imports go one way, no two modules share a name, only scripts end the process."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each may import only what stands before it. Scripts and tools stand last and are never imported.
LAYERS = (
    "runtime",
    "geometry",
    "metrics",
    "dataset",
    "vq_vae",
    "depth",
    "preprocessing",
    "model_convGru",
    "model_geometry",
    "rollout",
    "training",
    "luanti",
    "evaluation",
    "playing",
    "benchmarking",
)
SCRIPTS = ("preprocess", "train", "inference", "live_inference", "evaluate", "record", "benchmark")
VQ_VAE_SCRIPTS = ("train_vqvae", "preprocess_vqvae", "vq_vae_inference")


def modules() -> list[Path]:
    """All Python files of the project but the tests."""
    folders = [name for name in (*LAYERS, "tools") if (ROOT / name).is_dir()]
    return sorted([*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))])


def imported(path: Path) -> set[str]:
    """First words of the modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def layer(path: Path) -> int:
    """Position in LAYERS; beyond it for scripts and tools."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def test_every_folder_of_code_has_a_layer():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {name for name in (*LAYERS, "tools") if (ROOT / name).is_dir()}
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts == {*SCRIPTS, "model_convGru", "model_geometry"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0]
    for name in imported(path) - {own}:
        assert name not in (*SCRIPTS, "tools"), f"imports the script {name}"
        if name in LAYERS:
            assert LAYERS.index(name) < layer(path), f"{own} imports {name}, which stands above it"


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in modules() if path.name != "__init__.py")
    # The network and its package have the name of the paper; so has the package `rollout`.
    assert not [name for name, count in names.items() if count > 1]


def test_only_main_ends_the_process():
    for path in modules():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and getattr(node.exc.func, "id", "") == "SystemExit"
        ]
        if path.parent != ROOT and path.parent.name not in ("tools", "vq_vae", "depth"):
            allowed = 1 if path.stem == "config" else 0  # --help of scripts with constants
            assert len(calls) <= allowed, path


# Modules with files that are not written at once: logs that grow, a lock, files of the running game.
WRITE_DIRECTLY = {"run_log", "diagnostics", "folder_lock", "game", "record"}


def test_files_are_written_through_outputs():
    """So that each is complete or not there: what is written to is the `part` that `replacing` gives."""
    for path in modules():
        if path.stem in WRITE_DIRECTLY:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of_path = name in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute)
            target = node.func.value if of_path else (node.args or [None])[0]
            opened = node.args[1] if name == "open" and len(node.args) > 1 else None
            mode = str(opened.value) if isinstance(opened, ast.Constant) else ""
            if of_path or name in ("savez", "savez_compressed", "savefig") or set(mode) & set("wax+"):
                to = getattr(target, "id", getattr(target, "attr", ""))
                assert to in ("part", "file", "path", "sink", "devnull"), f"{path}:{node.lineno}"
