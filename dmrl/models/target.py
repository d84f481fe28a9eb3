"""The platform that a program is traced for."""

import jax


def platform() -> str:
    """What programs are compiled for: of the mesh in use, which need not be attached."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
