"""Where tests find real data: ../shared/data beside the repository. Absent on most machines; those tests then skip."""
import pathlib

import pytest

DATA = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f'real data for this test is not at {DATA}')
