"""The demo: a made-up ticket task, and a tiny base that knows its messages but no conventions."""
