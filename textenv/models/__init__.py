"""Language models of Transformers: loaded or refused, decoded from a cache, sampled from."""
