"""Reads YAML files and command lines; every mistake is one line that names the key or `file:line`."""
