"""Generated answers against references: with the images, without seeing them, and by guessing."""
