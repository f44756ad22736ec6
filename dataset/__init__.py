"""Recorded play on disk and in memory.

actions        the action vector: names, units, conversion from and to each recording format
surroundings   depth and the nodes around the player: codes and depth files
recordings     recorded clips: finding, reading and writing them, frames to keep at a target rate
token_files    token files and the manifest that lists them
manifests      the manifests of one folder: comparing their settings and joining them
windows        the token files of a split in memory, and windows of consecutive frames
picture_check  measures from the pictures whether actions, poses and depth belong to them
clip_check     checks a whole data set
clip_report    formats the result of the check
"""
