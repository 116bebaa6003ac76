"""Every stage keeps its operands on one device; shown without hardware (``fake_device``)."""

import json
import subprocess
import sys
from pathlib import Path

import fake_device
import pytest
from conftest import Shared
from fake_device import CASES, DTYPES, case_name
from fake_students import CONFIGS
from tiny_models import ONE_THREAD


@pytest.fixture(scope="session")
def errors(shared: Shared) -> dict[str, str]:
    """What went wrong on the device, by case."""

    def run(file: Path) -> None:
        paths = ":".join([str(Path(fake_device.__file__).parent), *sys.path])
        command = [sys.executable, fake_device.__file__]
        environment = ONE_THREAD | {"PYTHONPATH": paths}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        file.write_text(result.stdout)

    found: dict[str, str] = json.loads(shared("fake_device.json", run).read_text())
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_operands_are_on_one_device(
    errors: dict[str, str], family: str, dtype: str, case: str
) -> None:
    assert errors[case_name(family, dtype, case)] == ""
