"""Images: checked and decoded under limits, and heat maps of them. All but ``heat`` need Pillow."""
