"""Luanti, the open voxel game, as a source of clips: the game in lockstep, its two mods, and a player."""
