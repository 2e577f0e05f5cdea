"""Models by name: where their weights are, and what they want of images, texts and parameters."""
