"""Every test runs on 16 emulated CPU devices, in strict numerics; set here, before jax starts."""

import os

# What only this process needs: taken back below once jax has read it, so that scripts which tests start as
# subprocesses meet the environment a user has.
_WHILE_JAX_STARTS = {
    # XLA:CPU sizes its thread pool by this. With the default, 32 executions in flight that nobody waited for
    # leave no thread for the last device of a collective: a deadlock at its rendezvous, then an abort.
    "NPROC": "32",
    # Devices share few cores, so one may reach a collective minutes after another; the default kills at 60 s.
    # Tests compile much and compute little: unoptimised machine code halves the compile time. It is the same
    # program with the same collectives.
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_backend_optimization_level=0",
}
_before = {name: os.environ.get(name) for name in _WHILE_JAX_STARTS}
os.environ.update(_WHILE_JAX_STARTS)
os.environ["JAX_PLATFORMS"] = "cpu"  # subprocesses too: tests never take an accelerator

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_enable_x64", True)  # for the float64 equalities; float32 is always asked for by name
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
assert len(jax.devices()) == 16, f"tests need 16 emulated CPU devices, found {jax.devices()}"

for _name, _value in _before.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value
