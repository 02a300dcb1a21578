"""The demo as a Hugging Face Space, which has this file, requirements.txt and README.md at its top level only."""

import os

if __name__ == "__main__":
    # Visitors must not trigger downloads of large weights. Read at the first import of the hub's library, after this.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from steer.apps.demo.app import serve
    from steer.apps.demo.studio import Studio, embedded_models

    serve(Studio(embedded_models()))  # a Space itself sets the address, and lets everybody in
