"""The files of a Space: app.py, requirements.txt, README.md."""
