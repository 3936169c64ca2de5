"""Semantic segmentation in ADE20k's format."""
