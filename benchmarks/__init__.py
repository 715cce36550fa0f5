"""Speed and memory beside the nearest peer, measured in one process, in turns: `make bench`.

Times are of the machine that they were taken on: no test depends on them.
"""
