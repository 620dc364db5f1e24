from craft_jax.runtime import hardware


def test_devices_in_words():
    assert hardware.devices_in_words() == "8 cpu devices"
