"""The page of live captions: `serve.py` starts it, `guard.py` says who may come in, and `hub.py`
holds the streams and the one thread on which the model works. A `live_stream.py` takes frames from
a child process that decodes or from a browser's camera, and tells its viewers.
"""
