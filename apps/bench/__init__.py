"""`steer bench`: what steering and finetuning cost, against the plain pipeline and against naive implementations."""
