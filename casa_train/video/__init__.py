"""Videos, cameras and piped streams as frames at moments of their time, and subtitles drawn into a
copy of a video. The only room that knows PyAV.
"""
