"""The tests of tests/test_fuzz.py, led by coverage: atheris chooses the bytes from which hypothesis draws its examples.

`pip install atheris`, then
`PYTHONPATH=src:tests python benchmarks/fuzz.py test_yaml -max_total_time=300 -timeout=10 -len_control=0`;
what follows the test's name goes to libFuzzer. The first finding ends the process; hypothesis keeps the example, and
`pytest tests/test_fuzz.py` shows it again.
"""

import sys

import atheris

with atheris.instrument_imports(include=["formtune", "json", "yaml", "jsonschema"]):
    import test_fuzz

atheris.Setup(sys.argv, getattr(test_fuzz, sys.argv.pop(1)).hypothesis.fuzz_one_input)
atheris.Fuzz()
