"""The loss of a window for each model, its terms, motion pretraining, validation and several processes."""
