"""Camera, warping, keyframes and motion: what moves the last pictures into the next view."""
