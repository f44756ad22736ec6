"""Actions, recordings, token files, windows of them, and the check of a data set."""
