"""Train, sample and evaluate models that write text and paint images with one transformer."""

__version__ = "0.1.0"
