"""The training backend on megatron.core.

Importing anything of this package puts the device shim in place, before whatever imports megatron.core.
"""

from miles.backends.megatron_utils.device_shim import install

install()
