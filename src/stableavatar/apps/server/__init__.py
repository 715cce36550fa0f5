"""``stableavatar serve``: videos by HTTP, in the form of the OpenAI videos API.

`schemas` is what is sent and answered, `access` who may, `videos` the routes, `speaking` the WebSocket,
`health` what operators ask, and `app` puts them together. Everything else is `stableavatar.jobs`.
"""
