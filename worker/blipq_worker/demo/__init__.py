"""The demo model, its small world, and where its weights are."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
OPT = MODELS / "opt"
ITM = MODELS / "itm"
