"""A checkpoint of another version, base or template is refused in one line."""

import pytest

from formtune.base.folder import check_identity
from formtune.errors import UserError

NOW = {"base": "a", "format": "b", "processes": 1, "orders": None, "adapter": None, "template": "c"}


@pytest.mark.parametrize("recorded", [None, {"base": "a", "format": "b", "processes": 1}])
def test_a_checkpoint_of_an_older_version_is_refused(recorded):
    with pytest.raises(UserError, match="not written by this version .* start a new run"):
        check_identity(recorded, NOW, resumes=False)


def test_what_this_version_recorded_is_taken():
    check_identity(NOW | {"skipped": [0, 0]}, NOW, resumes=True)
