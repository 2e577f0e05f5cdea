"""The whole product measured on one GPU, in minutes: ``make gpu``.

Read in this order: ``__main__`` (groups, their processes and limits), ``service`` (the whole
service), ``engine`` (the model's side alone, and plain ``generate`` beside it), ``checks`` (whether
answers are right), ``fake`` (the service with a device that only takes time, on a CPU), ``record``
(figures as JSON), ``table`` (figures for people), ``kit`` (all that a bare machine lacks).
"""
