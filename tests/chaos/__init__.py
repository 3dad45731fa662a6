"""Real daemons and real jobs, broken at random while every operation is written down and checked against a model.

`python -m tests.chaos --seed N --seconds S`; the same seed breaks the same things in the same order, although not
at the same moments.
"""
