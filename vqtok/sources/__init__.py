"""Where media come from: folders and data sets with captions and labels, for pictures and recordings alike."""
