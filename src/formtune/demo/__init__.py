"""The demo: a made-up ticket task, its messy data set, and a tiny base that knows the messages but no conventions."""
