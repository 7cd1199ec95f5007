"""The inference engine: scheduler, KV cache, adapter slots, sampler, and the runners of the backends."""
