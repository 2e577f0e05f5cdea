"""The jobs this process has claimed, and who hears when a claim is lost."""


class Lost(Exception):
    """The claim is gone: cancelled, expired or taken over. Nobody wants the answer."""
