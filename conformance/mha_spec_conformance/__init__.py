"""The conformance suite of mha-spec.

A case passes through the folders in this order, and each folder imports only earlier ones:

- `suite`: the functions, the cases with their expected values, the clauses and the conventions;
- `targets`: load an implementation, read its claims, and convert arrays to its library;
- `asking`: make asks of cases, and questions of asks, which the process of the target answers;
- `mistakes`: the known mistakes, each a reference with a replaced step;
- `judging`: compare answers under the accuracy rule (`bounds`), and diagnose wrong answers;
- `running`: ask everything that a target claims, and count the results;
- `reporting` and `fuzzing`: report a run; make random calls;
- `commands`: the commands of `mha-spec`.
"""
