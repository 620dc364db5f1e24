import subprocess
import sys

from craft_jax.runtime import hardware
from tests.conftest import environment


def test_devices_in_words():
    assert hardware.devices_in_words() == "8 cpu devices"


def test_the_peak_is_not_that_of_the_parent():
    show = "from craft_jax.runtime import hardware; print(hardware.peak_host_bytes())"
    parent = f"""if True:
        import subprocess, sys
        large = b"x" * 2**30
        subprocess.run([sys.executable, "-c", {show!r}], check=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", parent], env=environment(), capture_output=True, check=True
    )
    assert 2**26 < int(done.stdout) < 2**29
