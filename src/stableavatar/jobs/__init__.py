"""Videos that are asked for now and made in turn, for the server and the web page.

A request becomes a job: a row in SQLite and a folder with its portrait and its speech (`store`), after its
files were looked at in a process of their own (`intake`). Worker processes (`worker`), which the server
starts and starts again (`workers`), take jobs fairly and make them by `AvatarPipeline.generate`, whose
journal lets a job go on after a kill. What is finished of a video can be watched meanwhile
(`media.following`).

Processes know of each other by the database and the folders alone, so any of them may be killed at any time.
"""
