from craft_jax.runtime import cpu_memory


def test_keeping_freed_memory_does_no_harm():
    cpu_memory.keep_freed_memory()
    cpu_memory.return_freed_memory()
