"""What operators ask: is it well, what is waiting, what are the numbers."""
