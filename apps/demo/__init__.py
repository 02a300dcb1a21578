"""The demo app: particles live, choices recorded. `steer.apps.demo.app.build` makes it."""
