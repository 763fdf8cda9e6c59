"""Looking at data as it will be trained: what a mixture draws, how packs are filled, and every
token and picture of some of them.
"""
