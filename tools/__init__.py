"""Scripts for occasional use: pack clips, cut start places, convert and strip checkpoints."""
