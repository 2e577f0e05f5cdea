"""How often a process was told to end."""

from blipq_worker.process.signals import EndSignals


def test_what_comes_soon_after_the_first_signal_is_its_echo() -> None:
    now = 5.0
    signals = EndSignals(1.0, lambda: now)
    assert not signals.is_echo()
    now = 5.9
    assert signals.is_echo()
    now = 6.0
    assert not signals.is_echo()
    assert not signals.is_echo()
