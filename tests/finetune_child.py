"""A training in a process of its own, to be killed: python finetune_child.py METHOD MODEL FOLDER."""

import sys

from finetune_runs import train

from steer.apps.models import load_pipeline

if __name__ == "__main__":
    method, model, folder = sys.argv[1:]
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    with open(sys.stdout.fileno(), "w", buffering=1, closefd=False) as lines:
        train(method, pipe, folder, on_update=lambda record: lines.write(f"{record['step']}\n"))
