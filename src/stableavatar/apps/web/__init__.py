"""``stableavatar app``: a page for people who never open a terminal.

`texts` is what it says, in English and Chinese, `studio` what its tabs have in common, `talk`, `tools`,
`gallery` and `models` are the tabs, `page` puts them together, and `app` runs it. Videos are made by
`stableavatar.jobs`, as the server's are.
"""
