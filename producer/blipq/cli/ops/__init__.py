"""Commands for operators: the processes they run, and looking after what went wrong."""
