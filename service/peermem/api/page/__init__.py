"""The daemon's own page at its HTTP port, for the minute before there is a dashboard.

`door` says who gets it, `document` makes what it shows, and `files` are what the browser runs.
"""
