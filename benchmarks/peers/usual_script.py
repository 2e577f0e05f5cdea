"""The usual script: one ``generate`` per image or question, in a loop."""

from common import Model, tell, timed

if __name__ == "__main__":
    model = Model()
    tell({"one by one": timed(lambda work: [model.answer([each])[0] for each in work])})
