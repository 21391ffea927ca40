"""Statistics of success rates: intervals, paired differences, sample sizes.

Pure numpy and scipy on outcomes `(S, n)`: S training seeds of a method on the same n
initial states. The docstrings give the formulas and their references.

- `rates`: one success rate with its interval, for one checkpoint or several seeds.
- `differences`: the difference of two rates on the same initial states, and its mean
  over tasks; McNemar's exact test; Holm's correction.
- `power`: how many episodes or training seeds a difference needs.
- `sequential`: planned looks at a growing experiment.
- `compare`: several methods against a baseline, paired by initial state.
"""
