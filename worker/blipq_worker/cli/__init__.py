"""The worker's commands. ``blipq`` finds them through the entry points ``blipq.commands``.

What takes seconds to import, such as torch, is imported only when a command runs.
"""
