"""Images: an index over zip files or folders, transforms, and ways to read them as batches."""
