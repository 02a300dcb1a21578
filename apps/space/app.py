"""The demo as a Hugging Face Space: this file, requirements.txt and README.md at its top level, nothing else."""

import os

if __name__ == "__main__":
    # No visitor shall make it fetch large weights. Read when the hub's library is first imported, after this.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from steer.apps.demo.app import serve
    from steer.apps.demo.studio import Studio, embedded_models

    serve(Studio(embedded_models()))  # a Space says itself where to listen, and lets everybody in
