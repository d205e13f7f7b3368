"""Folders of files: where they come from and how they are published. Knows no model."""
