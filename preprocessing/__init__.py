"""Recorded clips to token files: pictures to tokens, depth from the recording or predicted."""
