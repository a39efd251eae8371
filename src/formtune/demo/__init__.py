"""The demo: a made-up ticket task, its messy data set, and a tiny base model that knows the task but not the format."""
