"""Recording from Luanti, an open-source voxel game.

game      the running game, stepped frame by frame, with its two mods (clientmods, worldmods) and lockstep.c
player    the scripted player
recorder  records clips in a running game
"""
