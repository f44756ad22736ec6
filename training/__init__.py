"""Training: settings, curriculum, window losses, motion pretraining, validation, several processes."""
