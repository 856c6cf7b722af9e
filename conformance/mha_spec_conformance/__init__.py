"""The conformance suite of mha-spec.

A case passes through the folders in this order, and each imports only those before it:

- `suite`: the functions, the cases with their expected values, the clauses and the conventions;
- `targets`: loading an implementation, its claims, and conversion of arrays to its library;
- `asking` and `mistakes`: the calls and the processes that make them; known mistakes;
- `judging`: comparison under the accuracy rule (`bounds`), outcomes, and diagnosis;
- `running`: asking everything that a target claims, and counting the results;
- `reporting` and `fuzzing`: reports of a run; random calls;
- `commands`: the commands of `mha-spec`.
"""
