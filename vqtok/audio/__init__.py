"""The audio room: data. Model and feature extractor come next."""
