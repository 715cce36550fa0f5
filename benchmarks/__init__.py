"""Speed and memory beside the nearest peer, measured in one process, in turns: `make bench`.

Never part of the tests: times are of the machine that they were taken on.
"""
