"""The page of live captions: `serve.py` binds a port and asks `guard.py` who may come in, `hub.py`
holds the streams and the one thread on which the model works, and each `live_stream.py` takes
frames from a child process that decodes or from a browser's camera and tells its viewers.
"""
