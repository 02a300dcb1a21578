"""`steer bench`: the cost of steering and finetuning, against the plain pipeline and naive implementations."""
