"""Live captions: a video, a camera or a pipe in, words while it plays. `captioner.py` is the
model's side, `playing.py` the clock's, `caption_files.py` what stays; `web/` is a page to watch.
"""
