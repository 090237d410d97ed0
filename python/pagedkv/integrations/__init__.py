"""Caches for other libraries, built on KVCache. Import the module of the library you use."""
