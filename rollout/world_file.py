"""A world in one file, NAME.zip: what another machine needs to play it.

    world.pt  vqvae.pt  depth.pt  card.md  starts/manifest.json  starts/PLACE.npz ...  SHA256SUMS

depth.pt is there for a geometry model only. tools/pack_world.py writes such a file, `--world` of every script
that rolls out reads it. A file may come from anyone: no other member is accepted, nothing is unpacked that is
larger than such files are, all checksums must be right, and the checkpoints are then loaded as any other.
"""

import atexit
import hashlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from dataset.token_files import MANIFEST
from runtime.errors import UserError, one_line
from runtime.outputs import replacing

WORLD, TOKENIZER, DEPTH, CARD = "world.pt", "vqvae.pt", "depth.pt", "card.md"
STARTS, SUMS = "starts", "SHA256SUMS"
REQUIRED = (WORLD, TOKENIZER, CARD, f"{STARTS}/{MANIFEST}", SUMS)
PLACE = re.compile(rf"{STARTS}/[\w-]{{1,60}}\.npz", re.ASCII)
MOST_PLACES = 200
# Bytes of one member, unpacked, by the ending of its name.
MOST_BYTES = {".pt": 2**31, ".npz": 2**27, ".json": 2**22, ".md": 2**20, "": 2**16}
BLOCK = 2**20


class WorldFileError(UserError):
    """A world file that cannot be used."""


def write_world_file(path: str | Path, members: Mapping[str, bytes | Path]) -> None:
    """Writes a world file, complete or not at all, with the checksums of its members.

    `members` maps the names above, but for SHA256SUMS, to contents or files. Raises WorldFileError if one is
    missing or not allowed, OutputError.
    """
    contents = {
        name: content if isinstance(content, bytes) else Path(content).read_bytes()
        for name, content in members.items()
    }
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    contents[SUMS] = sums.encode()
    if wrong := _wrong_members({name: len(content) for name, content in contents.items()}):
        raise WorldFileError(f"{path}: not written: {wrong}")
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, content in contents.items():
            # A fixed date, so that the same world gives the same file.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


def _wrong_members(sizes: Mapping[str, int]) -> str:
    """What is wrong with the members of a world file and their sizes in bytes; "" if nothing."""
    missing = [name for name in REQUIRED if name not in sizes]
    if missing:
        return f"it has no {', '.join(missing)}"
    strange = [name for name in sizes if name not in (*REQUIRED, DEPTH) and not PLACE.fullmatch(name)]
    if strange:
        return f"it holds {ascii(strange[0])[:80]}, which no world file has"
    if len(sizes) > len(REQUIRED) + 1 + MOST_PLACES:
        return f"it holds {len(sizes)} files, more than any world file has"
    for name, size in sizes.items():
        if size > MOST_BYTES[Path(name).suffix]:
            return f"its {name} takes {size / 1e6:.0f} MB, more than any world file has"
    return ""


def unpack_world_file(path: str | Path) -> Path:
    """Checks a world file and unpacks it into a new temporary folder, which is removed when the program ends.

    Raises WorldFileError, which names the file and says what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise WorldFileError(f"{path}: no such file; make one with python tools/pack_world.py {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack(path, archive)
    except WorldFileError:
        raise
    except OSError as error:
        raise WorldFileError(f"{path}: cannot be unpacked ({one_line(error)}); free some space") from None
    except Exception as error:  # a damaged zip can fail in any way
        reason = one_line(error)[:200]
        raise WorldFileError(f"{path}: not a readable world file ({reason}); copy it again") from None


def _unpack(path: Path, archive: zipfile.ZipFile) -> Path:
    """`unpack_world_file` of an open file."""
    infos = archive.infolist()
    sizes = {info.filename: info.file_size for info in infos}
    wrong = "two of its members have one name" if len(sizes) < len(infos) else _wrong_members(sizes)
    if wrong:
        raise WorldFileError(
            f"{path}: not a whole world file: {wrong}; copy it again, or give one that "
            "tools/pack_world.py wrote"
        )
    sums = {}
    for line in archive.read(SUMS).decode().splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    if set(sums) != set(sizes) - {SUMS}:
        raise WorldFileError(f"{path}: its {SUMS} does not list all of its members; copy or pack it again")
    folder = Path(tempfile.mkdtemp(prefix="world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / STARTS).mkdir()
    for name, expected in sums.items():
        digest, part = hashlib.sha256(), folder / name
        with archive.open(name) as member, open(part, "wb") as file:
            while block := member.read(BLOCK):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != expected:
            raise WorldFileError(
                f"{path}: the sha256 of its {name} begins with {digest.hexdigest()[:12]}, {SUMS} says "
                f"{expected[:12]}: it is damaged; copy it again"
            )
    return folder
