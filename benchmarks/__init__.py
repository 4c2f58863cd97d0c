"""fastrnn beside what a user would pick instead: ``python -m benchmarks``, or ``make bench``.

Every case is one problem (weights, input, output gradient) that all libraries get, each in its own
format. Their results are compared before anything is timed. Then all take turns in one process,
round after round, so that a noisy machine hits all alike, each at one thread and at all of them;
the figures are medians over the rounds, and ratios are taken within a round. The limits of the
machine, multiply-adds a second and bytes read a second, take part in the same rounds.

Then come fastrnn's properties, figures beside itself that no case shows, and what has changed since
the last run of this kind on this machine.

cases.py says what is measured, peers/ how each library does it, timing.py how time is taken,
machine.py on what, results.py what is concluded, properties.py and memory.py what else is looked
at, history.py what earlier runs found, report.py and plots.py how it is shown.
"""
