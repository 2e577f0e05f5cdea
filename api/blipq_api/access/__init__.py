"""Who asks the HTTP door: the keys they bring, and sessions in place of a key."""
