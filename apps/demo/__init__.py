"""The demo app: live particles, recorded choices. `steer.apps.demo.app.build` makes it."""
