"""Images: checked and decoded under limits. Needs Pillow."""
