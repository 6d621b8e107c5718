"""Python imports this module at its start, so that workers too have the device."""

import device  # noqa: F401
import host_cuda

host_cuda.install()
