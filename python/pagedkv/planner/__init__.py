"""How much memory a model needs, before there is a GPU.

`plan.plan_memory` answers with a `plan.MemoryPlan`; both are names of `pagedkv`. `model` finds the
config, `parameters` and `weights` weigh it, `groups` lays out the blocks, `fit` compares with the
budget, `changes` looks for what would fit.
"""
