"""Search indexes: read, written and filled. Needs what ``blipq[search]`` installs."""
