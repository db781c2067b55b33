"""Every test runs on 8 virtual CPU devices, with numpy-like silent rank promotion forbidden."""
import os

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUMPY_RANK_PROMOTION', 'raise')
