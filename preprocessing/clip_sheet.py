"""A contact sheet of a folder of token files: what the world model will see of each clip."""

from pathlib import Path

import numpy as np
import torch

from dataset.token_files import Manifest, read_token_file
from runtime.video import contact_sheet, spread, to_uint8
from vq_vae.tokenizer import Tokenizer

SHEET = "contact_sheet.png"  # in the folder of token files


def clip_sheet(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> np.ndarray:
    """The middle frames of some of the clips in `manifest`, evenly spread, as the tokenizer decodes them.

    Each is under its clip's name and split. -> [H, W, 3] uint8. Raises DataError for a broken token file.
    """
    chosen = [manifest.clips[i] for i in spread(len(manifest.clips))]
    middle, captions = [], []
    for clip in chosen:
        content = read_token_file(folder / clip.file, (), manifest.codebook_size, clip.frames)
        middle.append(content["tokens"][clip.frames // 2].astype(np.int64))
        split = "end held out" if clip.cut else {"train": "train", "val": "held out"}[clip.split]
        captions.append(f"{clip.name}: {split}, {clip.frames} frames")
    tokens = torch.from_numpy(np.stack(middle))
    pictures = torch.cat([to_uint8(part) for part in tokenizer.decode_frames(tokens)])
    return contact_sheet(list(pictures.numpy()), captions)
