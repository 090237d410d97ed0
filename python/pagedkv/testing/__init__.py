"""For the tests of code that uses pagedkv: a machine without mercy.

    device = SimulatedDevice(seed=7)
    with pk.KVCache(spec, device=device, num_device_blocks=8, num_host_blocks=8) as kv:
        ...  # your engine's steps and swaps
    assert device.violations == []

Copies run as late, as torn and in as odd an order as what is declared allows, all of it decided by
the seed, and every pair of accesses that nothing orders is a violation, whether or not it did harm.
"""

from pagedkv._core import SimulatedDevice

__all__ = ["SimulatedDevice"]
