"""Coverage-guided fuzzing: atheris chooses the bytes from which hypothesis draws the examples of test_fuzz.py.

`pip install atheris`, then
`PYTHONPATH=src:tests:tests/unit/formats python benchmarks/fuzz.py test_yaml -max_total_time=300 -timeout=10`;
what follows the test's name goes to libFuzzer. The first finding ends the process; hypothesis keeps the example, and
`pytest tests/unit/formats/test_fuzz.py` shows it again.
"""

import sys

import atheris

with atheris.instrument_imports(include=["formtune", "json", "yaml", "jsonschema"]):
    import test_fuzz

atheris.Setup(sys.argv, getattr(test_fuzz, sys.argv.pop(1)).hypothesis.fuzz_one_input)
atheris.Fuzz()
