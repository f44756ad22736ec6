"""The depth network: a picture to inverse ray distances. Network, training, loading, inference."""
