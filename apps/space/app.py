"""The demo as a Hugging Face Space: this file, requirements.txt and README.md at its top level, nothing else."""

from steer.apps.demo.app import serve
from steer.apps.demo.studio import Studio, embedded_models

if __name__ == "__main__":
    serve(Studio(embedded_models()))  # a Space says itself where to listen, and lets everybody in
