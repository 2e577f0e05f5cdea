"""How a step attends: to keys and values in static slots, by PyTorch or by a kernel of ours."""
