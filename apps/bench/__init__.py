"""`steer bench`: what steering and finetuning cost, against the plain pipeline and against what users would run else."""
