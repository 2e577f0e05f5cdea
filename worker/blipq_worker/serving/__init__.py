"""From a name in the settings to a resident model that was checked."""
