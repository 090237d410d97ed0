"""What `pagedkv demo` runs: a model generates with a dense cache and with pagedkv, side by side.

`command` is the whole of it, `model` finds the model, `runs` generates and compares, `picture`
draws a block tree, `swap` puts more requests through the example's engine than the device holds.
"""
